"""The public surface: what is exported, typed and documented, and what the package needs."""

import ast
import doctest
import inspect
import pkgutil
import sys
from pathlib import Path

import pytest

import hopjax

# `data` and `cli`, extras with needs of their own, are not imported by the package.
MODULES = [module.name for module in pkgutil.iter_modules(hopjax.__path__) if not module.ispkg and module.name != "__main__"]


def public_functions():
    for name in MODULES:
        module = __import__(f"hopjax.{name}", fromlist=["_"])
        for label, value in vars(module).items():
            if not label.startswith("_") and inspect.isfunction(value) and value.__module__ == module.__name__:
                yield pytest.param(value, id=f"{name}.{label}")


def test_exports_are_sorted_and_complete():
    assert hopjax.__all__ == sorted(hopjax.__all__)
    # Modules are attributes of their package; `jaxtyping` is left there by the tests' import hook.
    submodules = {module.name for module in pkgutil.iter_modules(hopjax.__path__)} - set(hopjax.__all__)
    assert {name for name in vars(hopjax) if not name.startswith("_")} - submodules - {"jaxtyping"} == set(hopjax.__all__)
    assert not any(name.startswith("_") for name in hopjax.__all__)


@pytest.mark.parametrize("function", list(public_functions()))
def test_functions_are_typed_and_documented(function):
    signature = inspect.signature(function)
    assert function.__doc__
    assert function.__doc__.strip()
    assert signature.return_annotation is not inspect.Signature.empty
    assert all(parameter.annotation is not inspect.Parameter.empty for parameter in signature.parameters.values())


@pytest.mark.parametrize("name", [name for name in hopjax.__all__ if inspect.isclass(getattr(hopjax, name))])
def test_results_are_pytrees_and_strategies_are_immutable(name):
    kind = getattr(hopjax, name)
    assert kind.__doc__
    if issubclass(kind, tuple):
        assert kind._fields
    else:
        strategy = kind()
        assert strategy == kind()
        assert hash(strategy) == hash(kind())
        with pytest.raises(AttributeError):
            strategy.anything = 1


@pytest.mark.parametrize("name", ["__init__", *MODULES])
def test_modules_need_the_dependencies_only(name):
    tree = ast.parse(Path(hopjax.__path__[0], f"{name}.py").read_text())
    assert ast.get_docstring(tree)
    # What only its own user calls may import it: scikit-learn asks for its tags.
    tags = [part for part in ast.walk(tree) if isinstance(part, ast.FunctionDef) and part.name == "__sklearn_tags__"]
    theirs = {node for part in tags for node in ast.walk(part)}
    for node in set(ast.walk(tree)) - theirs:
        imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        imported += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for module in imported:
            root = module.split(".")[0]
            assert root in {"jax", "jaxtyping", "numpy", "scipy", "hopjax"} or root in sys.stdlib_module_names, module
            assert root != "__future__"  # annotations are checked, not strings


@pytest.mark.usefixtures("unchecked")
def test_the_example_of_the_package_runs():
    results = doctest.testmod(hopjax)
    assert results.attempted > 0
    assert results.failed == 0
