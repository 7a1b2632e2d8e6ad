"""DeepSpeed's launcher of one node's ranks, made quick to import:

    python -m turnout.launch.ranks.deepspeed_launcher PARENT ARGUMENT...

PARENT is the process id of the command; the launcher dies with it. DeepSpeed's launcher only starts processes
and waits for them, but importing it imports torch and all of DeepSpeed, which takes more than a second. We
give it stand-ins for the few names that it uses. If a release uses other names, the import fails and the real
packages are imported instead.
"""

import importlib
import importlib.util
import logging
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from turnout.launch.ranks.parent import die_with_parent

LAUNCHER = "deepspeed.launcher.launch"


def main() -> None:
    die_with_parent(int(sys.argv.pop(1)))
    install_stand_ins()
    try:
        launcher = importlib.import_module(LAUNCHER)
    except (ImportError, AttributeError):
        for name in [name for name in sys.modules if name.partition(".")[0] == "deepspeed"]:
            del sys.modules[name]
        launcher = importlib.import_module(LAUNCHER)
    launcher.main()


def install_stand_ins() -> None:
    """Put stand-ins for the modules that DeepSpeed's launcher imports into sys.modules."""
    spec = importlib.util.find_spec("deepspeed")
    assert spec is not None and spec.origin is not None, "DeepSpeed is installed with Turnout"
    directory = Path(spec.origin).parent
    names: dict[str, dict[str, Any]] = {
        "deepspeed": {},
        "deepspeed.accelerator": {"get_accelerator": lambda: Devices},
        "deepspeed.utils": {
            "logger": (logger := logging.getLogger("deepspeed")),
            "set_log_level_from_string": lambda level: logger.setLevel(level.upper()),
            "get_numactl_cmd": None,  # for --bind_cores_to_rank, which we do not use
        },
    }
    for name, content in names.items():
        module = sys.modules[name] = ModuleType(name)
        module.__path__ = [str(directory.joinpath(*name.split(".")[1:]))]
        module.__dict__.update(content)


def _make_visible(environment: dict[str, str], devices: list[str]) -> None:
    environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, devices))


# The accelerator of NVIDIA's and AMD's GPUs; that of CPUs does the same.
Devices = SimpleNamespace(
    visible_devices_envs=lambda: ["CUDA_VISIBLE_DEVICES"], set_visible_devices_envs=_make_visible
)


if __name__ == "__main__":
    main()
