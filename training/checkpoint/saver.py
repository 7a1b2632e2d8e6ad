"""Saving a run from all its ranks at once, while it trains on, and finding the newest intact checkpoint.

    copy      each rank copies its pieces off the live tensors; training waits for this only
    write     each rank writes and flushes a file of its own, in the background
    report    the ranks tell the first one sizes and hashes; so all files are on the disk
    commit    the first rank writes the manifest, sees that the run is still its own, renames the directory
    verdict   it tells the others; where anything failed, every rank stops with the same words

A process may die at any point: until the rename the directory has no name that anybody reads.
"""

import json
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from turnout.training.checkpoint.directory import (
    checkpoint_path,
    list_checkpoints,
    list_old,
    none_intact,
    prune,
    publish,
    read_checkpoint,
    set_aside,
    sweep_unfinished,
    unfinished_path,
    verify_files,
)
from turnout.training.checkpoint.durable_io import Disk
from turnout.training.checkpoint.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    MANIFEST_SUM,
    ROUTER_FILE,
    Attached,
    FileEntry,
    Manifest,
    SavedLayout,
    TensorEntry,
    TrainingState,
    check_size,
    rank_file,
    to_bytes,
)
from turnout.training.checkpoint.rank_state import RankState
from turnout.training.checkpoint.tensor_files import write_bytes, write_tensors
from turnout.training.config.checkpoint import CheckpointConfig
from turnout.training.errors import CheckpointError, SaveError, TakenOverError, UnreadableError
from turnout.training.parallel.groups import Groups
from turnout.training.run_control import FencingToken

log = logging.getLogger("turnout")

# How long ranks may differ in writing. A rank that died is noticed by the step long before.
PATIENCE = timedelta(hours=2)


class Messages:
    """Texts between the ranks, on a gloo group of their own, so that a background thread may use it."""

    def __init__(self, groups: Groups) -> None:
        self.rank, self.world_size = groups.rank, groups.layout.world_size
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE)

    def gather(self, text: str) -> list[str]:
        """Return every rank's text, by rank, on the first rank; nothing elsewhere. Collective."""
        data = _to_bytes_tensor(text)
        sizes = torch.zeros(self.world_size, dtype=torch.int64)
        sizes[self.rank] = data.numel()
        dist.all_reduce(sizes, group=self._group)
        padded = torch.zeros(int(sizes.max()), dtype=torch.uint8)
        padded[: data.numel()] = data
        received = [torch.empty_like(padded) for _ in range(self.world_size)] if self.rank == 0 else None
        dist.gather(padded, received, dst=0, group=self._group)
        return [_to_text(part[:n]) for part, n in zip(received or [], sizes.tolist(), strict=False)]

    def tell(self, text: str) -> str:
        """Return the first rank's text on every rank. Collective."""
        data = _to_bytes_tensor(text) if self.rank == 0 else torch.empty(0, dtype=torch.uint8)
        size = torch.tensor(data.numel())
        dist.broadcast(size, src=0, group=self._group)
        if self.rank:
            data = torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(data, src=0, group=self._group)
        return _to_text(data)

    def close(self) -> None:
        dist.destroy_process_group(self._group)


def _to_bytes_tensor(text: str) -> Tensor:
    # A byte in front, because an empty tensor cannot be sent.
    return torch.frombuffer(bytearray(b" " + text.encode()), dtype=torch.uint8)


def _to_text(data: Tensor) -> str:
    return data.numpy().tobytes()[1:].decode()


@dataclass(frozen=True)
class Fault:
    """Why a checkpoint is not used. is_damage: not if it cannot be read, for then it may be intact."""

    words: str
    is_damage: bool


class Saver:
    """Writes the checkpoints of one start of a run; every rank has one and calls it at the same steps."""

    def __init__(
        self,
        run_dir: Path,
        groups: Groups,
        cfg: CheckpointConfig,
        fencing_token: FencingToken,
        attached: Attached,
        saved_layout: SavedLayout,
        disk: Disk | None = None,
    ) -> None:
        self._run_dir, self._groups, self._cfg, self._fencing_token = run_dir, groups, cfg, fencing_token
        self._attached, self._saved_layout, self._disk = attached, saved_layout, disk or Disk()
        if groups.is_first:  # before the others can get past the next line, and begin to write
            fencing_token.check()
            sweep_unfinished(run_dir)
        self._messages = Messages(groups)
        self._host: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self.newest_step: int | None = None  # of this start's saves, under way or done
        self.longest_s: float | None = None  # that a save took, until it had its name

    def save(self, share: RankState, state: TrainingState) -> None:
        """Copy what this rank holds and write it in the background. Waits for an earlier save. Collective.

        Raises SaveError or TakenOverError of the earlier save; of this one where cfg.async_save is off.
        """
        start_s = time.perf_counter()
        self.wait()
        self.newest_step = state.step
        share = share.copied_to(self._host)
        stall_ms = 1000 * (time.perf_counter() - start_s)
        self._thread = threading.Thread(target=self._work, args=(share, state, stall_ms), name="checkpoint")
        self._thread.start()
        if not self._cfg.async_save:
            self.wait()

    def poll(self) -> None:
        """Raise, on every rank at the same step, what went wrong with a save that has ended. Collective.

        What no save should raise is raised at once: the other ranks' threads wait for this one's.
        """
        if self._thread is None:
            return
        is_over = self._groups.all_agree(not self._thread.is_alive())
        is_stray = self._failure is not None and not isinstance(self._failure, SaveError | TakenOverError)
        if is_over or is_stray:
            self.wait()

    def wait(self) -> None:
        """Wait for the save under way. Raises SaveError or TakenOverError, the same on every rank."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        self.wait()
        self._messages.close()

    def find_intact(self, on_event: Callable[[str], None] = log.warning) -> tuple[Path, Manifest] | None:
        """Return the newest checkpoint whose every byte is as it was written; None where there is none.

        The ranks read it together, each its share of the files. Damaged ones lose their name once an intact
        one is found, and on_event hears of them. Collective. Raises, on every rank, CheckpointError where
        there are some and none is intact, and then all keep their names; TakenOverError where a later start
        owns the run: names are no longer this one's to change.
        """
        self.wait()
        self._check_owner()
        self._disk.boundary("find", self._run_dir)
        names = self._messages.tell("\n".join(path.name for path in list_checkpoints(self._run_dir)))
        faults: dict[Path, Fault] = {}
        for name in names.split():
            path = checkpoint_path(self._run_dir, 0).with_name(name)
            found = self._verify(path)
            if isinstance(found, Fault):
                faults[path] = found
                continue
            for other, fault in faults.items():
                kept = "it keeps its name, as it may be intact"
                on_event(f"not used: {fault.words}; {self._set_aside(other) if fault.is_damage else kept}")
            return path, found
        if faults:
            raise CheckpointError(none_intact(self._run_dir, [fault.words for fault in faults.values()]))
        return None

    def _set_aside(self, path: Path) -> str:
        """Take the name from a damaged checkpoint, where that is possible; say so, the same on every rank."""
        words = ""
        if self._groups.is_first:
            try:
                words = f"renamed to {set_aside(path, self._disk)}"
            except OSError as err:
                words = f"it could not be renamed: {err}"
        return self._messages.tell(words)

    def _check_owner(self) -> None:
        words = ""
        if self._groups.is_first:
            try:
                self._fencing_token.check()
            except TakenOverError as err:
                words = str(err)
        if words := self._messages.tell(words):
            raise TakenOverError(words)

    def _verify(self, path: Path) -> Manifest | Fault:
        """Read a checkpoint, each rank its share of the files; the same on every rank. Collective."""
        told = ""
        try:
            manifest = read_checkpoint(path)
            verify_files(path, manifest, self._groups.rank, self._groups.layout.world_size)
        except (CheckpointError, OSError) as err:
            told = json.dumps([str(err), not isinstance(err, UnreadableError | OSError)])
        told = self._messages.tell(next(filter(None, self._messages.gather(told)), ""))
        return Fault(*json.loads(told)) if told else manifest

    def _work(self, share: RankState, state: TrainingState, stall_ms: float) -> None:
        try:
            self._write(share, state, stall_ms)
        except BaseException as err:  # raised again by wait, on the thread that trains
            self._failure = err

    def _write(self, share: RankState, state: TrainingState, stall_ms: float) -> None:
        start_s = time.perf_counter()
        directory = unfinished_path(self._run_dir, state.step, self._fencing_token.token)
        report = self._report(share, directory)
        self._disk.boundary("report", directory)
        reports = self._messages.gather(report)
        self._disk.boundary("reported", directory)
        verdict = self._commit(directory, reports, share, state) if self._groups.is_first else ""
        self._disk.boundary("verdict", directory)
        kind, _, words = self._messages.tell(verdict).partition(":")
        if kind == "taken over":
            raise TakenOverError(words)
        if kind == "failed":
            raise SaveError(self._not_saved(state.step, words))
        elapsed_s = time.perf_counter() - start_s
        self.longest_s = max(self.longest_s or 0, elapsed_s + stall_ms / 1000)
        log.info(
            "saved step %d: %s, training waited %.0f ms, written in %.2f s",
            state.step,
            words,
            stall_ms if self._cfg.async_save else stall_ms + 1000 * elapsed_s,
            elapsed_s,
        )

    def _report(self, share: RankState, directory: Path) -> str:
        """Write this rank's file, and return its size, hash and pieces as JSON, or what went wrong."""
        try:
            self._disk.make_directory(directory)
            entry = write_tensors(self._disk, directory / rank_file(self._groups.rank), share.tensors)
        except OSError as err:
            return json.dumps({"error": f"rank {self._groups.rank}: {err}"})
        return json.dumps({"file": entry.model_dump(), "kinds": share.kinds, "shards": share.described()})

    def _commit(self, directory: Path, reports: list[str], share: RankState, state: TrainingState) -> str:
        """Finish the checkpoint and give it its name; return `ok:`, `failed:` or `taken over:` and why."""
        shares = [json.loads(report) for report in reports]
        errors = [share["error"] for share in shares if "error" in share]
        try:
            self._fencing_token.check()  # first: what a later start swept away cannot be written to
            if errors:
                raise OSError("; ".join(errors))
            router = write_tensors(self._disk, directory / ROUTER_FILE, share.router)
            manifest = self._manifest(directory, shares, {ROUTER_FILE: router}, state)
            text, check_sum = to_bytes(manifest)
            write_bytes(self._disk, directory / MANIFEST, text)
            write_bytes(self._disk, directory / MANIFEST_SUM, check_sum)
            self._fencing_token.check()
            for name, entry in manifest.files.items():
                check_size(directory / name, entry)
            final = publish(directory, self._run_dir, state.step, self._disk)
        except (OSError, CheckpointError, TakenOverError) as err:
            self._disk.discard(directory)
            return self._why_not(err)
        cfg, removed = self._cfg, list[Path]()
        try:
            old = list_old(self._run_dir, keep_last=cfg.keep_last, keep_every_steps=cfg.keep_every_steps)
            removed = prune(old, self._disk)
        except OSError as err:  # this checkpoint is safe; an old one that stays harms nobody
            log.warning("old checkpoints could not be removed: %s", err)
        gone = f", removed {', '.join(path.name for path in removed)}" if removed else ""
        return f"ok:{final}, {manifest.n_bytes / 2**20:.1f} MiB{gone}"

    def _why_not(self, err: OSError | CheckpointError | TakenOverError) -> str:
        """Return the verdict on a commit that failed."""
        try:
            # A file may be missing because a later start has taken over and swept the directory.
            self._fencing_token.check()
        except TakenOverError as taken_over:
            err = taken_over
        except OSError:
            pass  # what failed first says more
        return f"{'taken over' if isinstance(err, TakenOverError) else 'failed'}:{err}"

    def _manifest(
        self, directory: Path, shares: list[dict], files: dict[str, FileEntry], state: TrainingState
    ) -> Manifest:
        files |= {rank_file(rank): FileEntry(**share["file"]) for rank, share in enumerate(shares)}
        for name, content in self._attached.files.items():
            files[name] = write_bytes(self._disk, directory / name, content)
        tensors: dict[str, dict] = {}
        for rank, share in enumerate(shares):
            for name, (shape, n_rows, row_width, shard) in share["shards"].items():
                entry = tensors.setdefault(
                    name, {"shape": shape, "n_rows": n_rows, "row_width": row_width, "shards": []}
                )
                entry["shards"].append((rank, *shard))
        return Manifest(
            format_version=FORMAT_VERSION,
            saved_layout=self._saved_layout,
            data=self._attached.data,
            state=state,
            kinds=tuple(shares[0]["kinds"]),
            tensors={name: TensorEntry(**entry) for name, entry in sorted(tensors.items())},
            files=files,
        )

    def _not_saved(self, step: int, words: str) -> str:
        older = list_checkpoints(self._run_dir)
        newest = f"the newest checkpoint is {older[0]}" if older else "there is no checkpoint yet"
        way_out = "make room or mend the disk, then go on with --resume"
        return f"step {step} could not be saved: {words}; {newest}; {way_out}"
