"""Count this machine's GPUs. torch takes a second to import, so it is asked only if there is a GPU driver."""

from pathlib import Path

# Device files of NVIDIA's driver, of the same under WSL2, and of AMD's.
DRIVERS = (Path("/dev/nvidiactl"), Path("/dev/dxg"), Path("/dev/kfd"))


def count_gpus() -> int:
    """Return how many GPUs torch may use here, given CUDA_VISIBLE_DEVICES."""
    if not any(driver.exists() for driver in DRIVERS):
        return 0
    from torch.cuda import device_count

    return device_count()
