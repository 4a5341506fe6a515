"""Makes the golden file of the text encoder with torch and transformers: `python tests/diffusion/stable/golden/make_text_encoder.py`.

A folder of a tiny network with random weights, its tensors under the names that Stable Diffusion v1 publishes them by, with ids.npy,
last_hidden_state.npy and pooler_output.npy beside it.
"""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

FOLDER = Path(__file__).parent / "text_encoder"


def main() -> None:
    """Write it."""
    torch.manual_seed(0)
    # As published, eos_token_id is 2.
    config = CLIPTextConfig(
        vocab_size=40,
        hidden_size=12,
        intermediate_size=20,
        projection_dim=12,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=9,
        bos_token_id=0,
        eos_token_id=2,
        architectures=["CLIPTextModel"],
    )
    model = CLIPTextModel(config).eval()
    # At their initial values a mix-up of norms and biases would go unseen, and attention be nearly uniform.
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=0.4)
        elif "embedding" in name:
            torch.nn.init.normal_(parameter)
        else:
            torch.nn.init.normal_(parameter, std=(2.5 if "q_proj" in name or "k_proj" in name else 1.5) * parameter.shape[1] ** -0.5)
    # Every token of the vocabulary is in some prompt; each ends at the largest, which also pads it.
    generator = np.random.default_rng(0)
    lengths = (7, 3, 6, 6, 6, 6, 6, 6)  # the first ends at the last place
    ids = np.full((len(lengths), 9), 39)
    ids[:, 0] = 38
    tokens = generator.permutation(np.resize(np.arange(38), sum(lengths)))
    for row, part in zip(ids, np.split(tokens, np.cumsum(lengths)[:-1]), strict=True):
        row[1 : 1 + len(part)] = part
    with torch.no_grad():
        out = model(torch.from_numpy(ids))
    assert set(ids.ravel()) == set(range(40))
    FOLDER.mkdir(exist_ok=True)
    config.save_pretrained(FOLDER)
    tensors = {f"text_model.{name.removeprefix('text_model.')}": tensor.contiguous() for name, tensor in model.state_dict().items()}
    tensors["text_model.embeddings.position_ids"] = torch.arange(9)[None]
    save_file(tensors, FOLDER / "model.safetensors", metadata={"format": "pt"})
    np.save(FOLDER / "ids.npy", ids)
    np.save(FOLDER / "last_hidden_state.npy", out.last_hidden_state.numpy())
    np.save(FOLDER / "pooler_output.npy", out.pooler_output.numpy())


if __name__ == "__main__":
    main()
