"""Saving a run from all its ranks at once while it trains on, and finding the newest intact checkpoint.

A save has five phases:

    copy      each rank copies its shards from the live tensors; training waits only for this
    write     each rank writes and flushes a file of its own, in the background
    report    the ranks send sizes and hashes of their files to the first rank
    commit    the first rank completes the checkpoint and gives it its name
    verdict   the first rank broadcasts the outcome; after a failure every rank stops with the same message

The commit, on the first rank, in this order:

    1  check the fencing token, so that nothing is written for a run that a later attempt has taken over
    2  all ranks have reported, so their files are on the disk; if one reported an error, stop here
    3  write and flush router.safetensors, the attached files, manifest.json, and last manifest.sha256
    4  check the fencing token again, and the size of each file that the manifest lists
    5  flush the directory, rename away an earlier checkpoint of the same step, rename the directory to
       step-00001000, and flush checkpoints/

The rename commits the checkpoint. Only after it, the pointer file is written and old checkpoints are removed.
A process may die at any point: before the rename the directory has a name that nobody reads.
"""

import json
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from turnout.training.checkpoint.directory import (
    checkpoint_path,
    list_checkpoints,
    list_old,
    no_intact_message,
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
from turnout.training.errors import (
    CheckpointError,
    SaveError,
    TakenOverError,
    UnknownVersionError,
    UnreadableError,
)
from turnout.training.parallel.groups import Groups
from turnout.training.run_control import FencingToken

log = logging.getLogger("turnout")

# How much longer one rank may write than another. The training step notices a dead rank long before.
PATIENCE = timedelta(hours=2)


class Messages:
    """Sends texts between the ranks, over a gloo group of its own that a background thread may use."""

    def __init__(self, groups: Groups) -> None:
        self.rank, self.world_size = groups.rank, groups.layout.world_size
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE)

    def gather(self, text: str) -> list[str]:
        """Return every rank's text, by rank, on the first rank; an empty list elsewhere. Collective."""
        data = _to_bytes_tensor(text)
        sizes = torch.zeros(self.world_size, dtype=torch.int64)
        sizes[self.rank] = data.numel()
        dist.all_reduce(sizes, group=self._group)
        padded = torch.zeros(int(sizes.max()), dtype=torch.uint8)
        padded[: data.numel()] = data
        received = [torch.empty_like(padded) for _ in range(self.world_size)] if self.rank == 0 else None
        dist.gather(padded, received, dst=0, group=self._group)
        return [_to_text(part[:n]) for part, n in zip(received or [], sizes.tolist(), strict=False)]

    def broadcast(self, text: str) -> str:
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
    """Why a checkpoint is not used.

    is_damage      False if it could not be read: then it may be intact
    is_unknown     it has a version that this release does not know
    """

    message: str
    is_damage: bool
    is_unknown: bool


class Saver:
    """Writes the checkpoints of one attempt. Every rank has one and calls it at the same steps."""

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
        if groups.is_first:  # before the other ranks can pass the next line and start to write
            fencing_token.check()
            sweep_unfinished(run_dir)
        self._messages = Messages(groups)
        self._host: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self.newest_step: int | None = None  # of this attempt's saves, running or done
        self.longest_s: float | None = None  # duration of the longest save, until the checkpoint had its name

    def save(self, rank_state: RankState, state: TrainingState) -> None:
        """Copy this rank's state and write it in the background. Waits for an earlier save. Collective.

        Raises SaveError or TakenOverError of the earlier save, or of this one if cfg.async_save is off.
        """
        start_s = time.perf_counter()
        self.wait()
        self.newest_step = state.step
        rank_state = rank_state.copy_to_host(self._host)
        stall_ms = 1000 * (time.perf_counter() - start_s)
        args = (rank_state, state, stall_ms)
        self._thread = threading.Thread(target=self._work, args=args, name="checkpoint")
        self._thread.start()
        if not self._cfg.async_save:
            self.wait()

    def poll(self) -> None:
        """Raise the error of a save that has ended, on every rank at the same step. Collective.

        An error that no save should raise is raised at once: the other ranks' threads wait for this one.
        """
        if self._thread is None:
            return
        is_over = self._groups.all_agree(not self._thread.is_alive())
        is_expected = self._failure is None or isinstance(self._failure, SaveError | TakenOverError)
        if is_over or not is_expected:
            self.wait()

    def wait(self) -> None:
        """Wait for the running save. Raises SaveError or TakenOverError, the same on every rank."""
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
        """Verify every byte and return the newest intact checkpoint; None if the run has none. Collective.

        Each rank reads a part of the files. Once an intact checkpoint is found, damaged newer ones are
        reported to on_event and renamed. If there are checkpoints but none is intact, they keep their names.
        Raises, on every rank, CheckpointError if none is intact, UnknownVersionError for one of a later
        release, and TakenOverError if a later attempt owns the run; nothing is renamed then.
        """
        self.wait()
        self._check_fencing_token()
        self._disk.boundary("find", self._run_dir)
        names = self._messages.broadcast("\n".join(path.name for path in list_checkpoints(self._run_dir)))
        faults: dict[Path, Fault] = {}
        for name in names.split():
            path = checkpoint_path(self._run_dir, 0).with_name(name)
            found = self._verify(path)
            if isinstance(found, Fault):
                if found.is_unknown:  # an older one would lose the steps that a later release has taken
                    raise UnknownVersionError(found.message)
                faults[path] = found
                continue
            for other, fault in faults.items():
                kept = "it keeps its name, as it may be intact"
                on_event(f"not used: {fault.message}; {self._set_aside(other) if fault.is_damage else kept}")
            return path, found
        if faults:
            messages = [fault.message for fault in faults.values()]
            raise CheckpointError(no_intact_message(self._run_dir, messages))
        return None

    def _set_aside(self, path: Path) -> str:
        """Rename a damaged checkpoint if possible; return the outcome, the same text on every rank."""
        outcome = ""
        if self._groups.is_first:
            try:
                outcome = f"renamed to {set_aside(path, self._disk)}"
            except OSError as err:
                outcome = f"it could not be renamed: {err}"
        return self._messages.broadcast(outcome)

    def _check_fencing_token(self) -> None:
        error = ""
        if self._groups.is_first:
            try:
                self._fencing_token.check()
            except TakenOverError as err:
                error = str(err)
        if error := self._messages.broadcast(error):
            raise TakenOverError(error)

    def _verify(self, path: Path) -> Manifest | Fault:
        """Verify a checkpoint, each rank a part of the files; return the same on every rank. Collective."""
        fault = ""
        try:
            manifest = read_checkpoint(path)
            verify_files(path, manifest, self._groups.rank, self._groups.layout.world_size)
        except (CheckpointError, OSError) as err:
            is_unknown = isinstance(err, UnknownVersionError)
            is_damage = not is_unknown and not isinstance(err, UnreadableError | OSError)
            fault = json.dumps([str(err), is_damage, is_unknown])
        fault = self._messages.broadcast(next(filter(None, self._messages.gather(fault)), ""))
        return Fault(*json.loads(fault)) if fault else manifest

    def _work(self, rank_state: RankState, state: TrainingState, stall_ms: float) -> None:
        try:
            self._write(rank_state, state, stall_ms)
        except BaseException as err:  # wait raises it again, on the training thread
            self._failure = err

    def _write(self, rank_state: RankState, state: TrainingState, stall_ms: float) -> None:
        start_s = time.perf_counter()
        directory = unfinished_path(self._run_dir, state.step, self._fencing_token.token)
        report = self._report(rank_state, directory)
        self._disk.boundary("report", directory)
        reports = self._messages.gather(report)
        self._disk.boundary("reported", directory)
        verdict = self._commit(directory, reports, rank_state, state) if self._groups.is_first else ""
        self._disk.boundary("verdict", directory)
        kind, _, details = self._messages.broadcast(verdict).partition(":")
        if kind == "taken over":
            raise TakenOverError(details)
        if kind == "failed":
            raise SaveError(self._not_saved_message(state.step, details))
        elapsed_s = time.perf_counter() - start_s
        self.longest_s = max(self.longest_s or 0, elapsed_s + stall_ms / 1000)
        log.info(
            "saved step %d: %s, training waited %.0f ms, written in %.2f s",
            state.step,
            details,
            stall_ms if self._cfg.async_save else stall_ms + 1000 * elapsed_s,
            elapsed_s,
        )

    def _report(self, rank_state: RankState, directory: Path) -> str:
        """Write this rank's file; return its size, hash and shards as JSON, or the error."""
        try:
            self._disk.make_directory(directory)
            path = directory / rank_file(self._groups.rank)
            entry = write_tensors(self._disk, path, rank_state.tensors)
        except OSError as err:
            return json.dumps({"error": f"rank {self._groups.rank}: {err}"})
        shards = rank_state.to_plain_placements()
        return json.dumps({"file": entry.model_dump(), "kinds": rank_state.kinds, "shards": shards})

    def _commit(self, directory: Path, texts: list[str], rank_state: RankState, state: TrainingState) -> str:
        """Complete and name the checkpoint; return `ok:`, `failed:` or `taken over:`, with details."""
        reports = [json.loads(text) for text in texts]
        errors = [report["error"] for report in reports if "error" in report]
        try:
            self._fencing_token.check()  # first, because a later attempt may have removed the directory
            if errors:
                raise OSError("; ".join(errors))
            router = write_tensors(self._disk, directory / ROUTER_FILE, rank_state.router)
            manifest = self._manifest(directory, reports, {ROUTER_FILE: router}, state)
            text, check_sum = to_bytes(manifest)
            write_bytes(self._disk, directory / MANIFEST, text)
            write_bytes(self._disk, directory / MANIFEST_SUM, check_sum)
            self._fencing_token.check()
            for name, entry in manifest.files.items():
                check_size(directory / name, entry)
            final = publish(directory, self._run_dir, state.step, self._disk)
        except (OSError, CheckpointError, TakenOverError) as err:
            self._disk.discard(directory)
            return self._verdict_on(err)
        cfg, removed = self._cfg, list[Path]()
        try:
            old = list_old(self._run_dir, keep_last=cfg.keep_last, keep_every_steps=cfg.keep_every_steps)
            removed = prune(old, self._disk)
        except OSError as err:  # the new checkpoint is safe, and an old one that stays does no harm
            log.warning("old checkpoints could not be removed: %s", err)
        gone = f", removed {', '.join(path.name for path in removed)}" if removed else ""
        return f"ok:{final}, {manifest.n_bytes / 2**20:.1f} MiB{gone}"

    def _verdict_on(self, err: OSError | CheckpointError | TakenOverError) -> str:
        """Return the verdict on a commit that failed."""
        try:
            # A file may be missing because a later attempt has taken over and removed the directory.
            self._fencing_token.check()
        except TakenOverError as taken_over:
            err = taken_over
        except OSError:
            pass  # the first error says more
        return f"{'taken over' if isinstance(err, TakenOverError) else 'failed'}:{err}"

    def _manifest(
        self,
        directory: Path,
        reports: list[dict[str, Any]],
        files: dict[str, FileEntry],
        state: TrainingState,
    ) -> Manifest:
        files |= {rank_file(rank): FileEntry(**report["file"]) for rank, report in enumerate(reports)}
        for name, content in self._attached.files.items():
            files[name] = write_bytes(self._disk, directory / name, content)
        tensors: dict[str, dict[str, Any]] = {}
        for rank, report in enumerate(reports):
            for name, (shape, n_rows, row_width, shard) in report["shards"].items():
                entry = tensors.setdefault(
                    name, {"shape": shape, "n_rows": n_rows, "row_width": row_width, "shards": []}
                )
                entry["shards"].append((rank, *shard))
        return Manifest(
            format_version=FORMAT_VERSION,
            saved_layout=self._saved_layout,
            data=self._attached.data,
            state=state,
            kinds=tuple(reports[0]["kinds"]),
            tensors={name: TensorEntry(**entry) for name, entry in sorted(tensors.items())},
            files=files,
        )

    def _not_saved_message(self, step: int, error: str) -> str:
        older = list_checkpoints(self._run_dir)
        newest = f"the newest checkpoint is {older[0]}" if older else "there is no checkpoint yet"
        way_out = "free space or repair the disk, then resume with --resume"
        return f"step {step} could not be saved: {error}; {newest}; {way_out}"
