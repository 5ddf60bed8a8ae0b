"""A class is found by its place and its name: `@register("objective", "dpo")` makes `objective=dpo` work.

The decorated dataclass is at once the Hydra schema of that option, its documentation and its implementation:
composing a configuration ends with an instance of the class itself. A new option is one new file in a package
that `discover` walks, and nothing else. YAML files in this folder only set values.
"""

import importlib
import pkgutil
from collections.abc import Callable
from types import ModuleType
from typing import TypeVar

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

T = TypeVar("T", bound=type)

OPTIONS: dict[tuple[str, str], type] = {}
"""(group, name) -> class, for the help page."""


def register(group: str, name: str, package: str | None = None) -> Callable[[T], T]:
    """Offer a dataclass as `group=name`.

    Args:
        group: Hydra config group, for instance "optim"; "" for a root schema.
        name: the option's name in the group.
        package: where in the configuration it lands, when that is not the group's own name.
    """

    def decorate(cls: T) -> T:
        node = OmegaConf.structured(cls)
        _thaw(node)
        ConfigStore.instance().store(group=group or None, name=name, node=node, package=package)
        OPTIONS[group, name] = cls
        return cls

    return decorate


def _thaw(node: DictConfig) -> None:
    """Instances are frozen, but the configuration they are composed from is not."""
    OmegaConf.set_readonly(node, None)
    for key in node:
        if isinstance(child := node._get_node(key), DictConfig) and not child._is_none():
            _thaw(child)


def discover(package: ModuleType) -> None:
    """Import every module of a package, so that each registers what it offers."""
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
