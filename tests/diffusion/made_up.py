"""Tables of an experiment that never ran, whose truth is known."""

import numpy as np

from diffusion.claims import NONE
from hopjax.cli.table import Table

CLASSES = 3


def settings(policies, seeds, densities=None, timesteps=(500,)):
    plan = {"policies": list(policies), "timesteps": list(timesteps), "buffer": 20, "seeds": list(range(seeds)), "densities": densities}
    return {
        "plan": plan,
        "task1": {"source": "made up", "classes": None},
        "task2": {"source": "made up too"},
        "warnings": [],
        "accept": 0.9,
        "required": 0.6,
    }


def stacked(parts, settings):
    return Table({name: np.concatenate([part[name] for part in parts]) for name in parts[0]}, settings)


def samples(count=200, seeds=3, policies=(NONE, "high", "random", "low"), *, densities=0, spread=0.01, forgotten=1.0):
    """Energies 0 … 1; forgetting grows with them; high replay saves half at the top, low replay a little at the bottom, random in all.

    Args:
        densities: samples with changes of log density, ten times the rise: bound, without error; flow, half of it noise.
        forgotten: of the rise; 0 for none.
    """
    random = np.random.default_rng(0)
    energy = np.linspace(0, 1, count)
    hard = random.normal(1, 0.2, count)  # how hard an image is has nothing to do with its energy here
    saved = {NONE: 0 * energy, "high": 0.4 * (energy > 0.8), "random": 0.05 + 0 * energy, "low": 0.03 * (energy < 0.2)}
    parts = []

    def noise():
        return random.normal(0, spread, count)

    chosen = np.zeros(count, bool)
    chosen[np.linspace(0, count - 1, densities).round().astype(int)] = True
    constant = {"png_bytes": random.integers(100, 200, count), "total_variation": random.random(count)}
    constant |= {
        "perturbation": energy**2 + noise(),
        "rise": -energy,
        "sharpness": np.ones(count),
        "energy@10": energy + 0.2 * noise() / spread,
    }
    for seed in range(seeds):
        before = hard + noise()
        rise = forgotten * (0.1 + 0.5 * energy)
        found = {
            "seed": np.full(count, seed),
            "place": np.arange(count),
            "index": np.arange(count) + 7,
            "label": np.arange(count) % CLASSES,
            "energy": energy - 2,
            "odds": -energy,
            **constant,
            "before@500": before,
            "control@500": hard + noise(),
        }
        found |= {f"{policy}@500": before + rise - forgotten * saved.get(policy, 0.02) + noise() for policy in policies}
        if densities:
            delta = np.where(chosen, 10 * (found["none@500"] - before), np.nan)
            error = np.where(chosen, np.nanstd(delta), np.nan)
            found |= {"bound.none@300": delta, "bound.none.error@300": 0 * delta}
            found |= {"flow.none@300": delta + error * random.normal(size=count), "flow.none.error@300": error}
            found |= {
                "bound.high@300": delta - 1,
                "bound.high.error@300": 0 * delta,
                "flow.high@300": delta - 2,
                "flow.high.error@300": error,
            }
        parts.append(found)
    how = {"timestep": 300, "samples": densities, "measures": ["bound", "flow"]} if densities else None
    return stacked(parts, settings(policies, seeds, how))


# Errors on each task (column) after so many (row), without replay: Task 1 is worst after three, and was best after two.
LEARNT = {NONE: [[0.2], [0.1, 0.3], [0.9, 0.6, 0.4]], "high": [[0.2], [0.25, 0.3], [0.3, 0.35, 0.4]]}


def tasks(seeds=3):
    """The same in every seed, but for 0.01 × seed at the end."""
    rows = [
        {"seed": seed, "policy": policy, "after": after, "task": task, "error": error + 0.01 * seed * (after == 3), "samples": 50}
        for policy, matrix in LEARNT.items()
        for seed in range(seeds)
        for after, line in enumerate(matrix, 1)
        for task, error in enumerate(line, 1)
    ]
    return Table({name: np.array([row[name] for row in rows]) for name in rows[0]}, settings(LEARNT, seeds))


def generated(seeds=3, count=60, *, before=None):
    """Real images: 50 of 60 are recognised, of all classes alike. `before` says how many of the model before Task 2 are, by seed; without
    replay half are, and only of class 0."""
    before = before or [45] * seeds
    parts = []
    for seed in range(seeds):
        for policy, sure in (("real", 50), ("before", before[seed]), (NONE, 30 + seed), ("high", 40)):
            labels = np.zeros(count, int) if policy == NONE else np.arange(count) % CLASSES
            confidence = np.where(np.arange(count) < sure, 0.95, 0.9)  # 0.9 is not above 0.9
            parts.append({"seed": np.full(count, seed), "policy": np.full(count, policy), "label": labels, "confidence": confidence})
    return stacked(parts, settings(LEARNT, seeds))


def sheets(seeds=3, channels=1):
    random = np.random.default_rng(0)
    names = [f"{seed}.{policy}" for seed in range(seeds) for policy in ("before", NONE, "high")]
    return {name: random.integers(0, 256, (40, 6, 5, channels)).astype(np.uint8) for name in names}
