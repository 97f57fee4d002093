"""What a run from disk to disk has done so far, in files: after a crash, the same command goes on from there.

    .<output>.unfinished/      beside the output; `.unfinished/` in it if that is an existing, empty folder
        manifest.json            what is made of what: another recipe or model is refused
        checkpoint/              shards of finished blocks, and in the end all else: becomes the output
        state/tokens.pt          results of the phases before pruning; there once they are complete
        state/block-00007.json   there once block 7 is done: its reports, its shards, the files of the next inputs
        hidden/                  inputs of the next block, batch by batch
        scratch/                 emptied by the next run
        lock                     held by the process that is at it
        process-1/               state, hidden and scratch of the second of several processes; the first has the rest

Every file appears by a rename, after its content and before whatever counts on it.
"""

import contextlib
import itertools
import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .. import ranks
from ..pipeline import Calls
from ..report import LayerReport
from .checkpoint import atomically, check_new, read_json, sync, writing


HIDDEN_LIMIT = 2**29  # bytes of hidden states of one path that are also kept in memory
MANIFEST = "manifest.json"
COMPLETE = "complete"
LOCK = "lock"


class Journal:
    """One unfinished run. All of several processes have one, and make and use them together.

    Attributes:
        folder: where everything is until the run is complete.
        complete: whether `checkpoint` is, and has only to become the output.
        checkpoint: the folder to fill with what becomes the output.
        scratch: for what need not outlive this process.
        layers: reports of the finished blocks, in order.
        shards: names of their files in `checkpoint`, in order.
        start: the first block that is not finished.
        seconds: of the phases until then.
    """

    def __init__(self, output: str | os.PathLike, manifest: dict[str, Any]):
        """Begin, or go on.

        Args:
            manifest: as JSON gives it back; all that the result depends on.

        Raises:
            FileExistsError: `output` exists and is not an empty folder.
            ValueError: it was begun with another manifest; names the differences.
            OSError: another process is at it.
        """
        self.output = Path(os.path.abspath(output))  # "." has a name as well
        beside, inside = self.output.with_name(f".{self.output.name}.unfinished"), self.output / ".unfinished"
        self.folder = inside if self.output.is_dir() and not beside.exists() else beside
        self._own = self.folder / f"process-{ranks.rank()}" if ranks.rank() > 0 else self.folder
        self.checkpoint, self.scratch = self.folder / "checkpoint", self._own / "scratch"
        self._state, self._hidden = self._own / "state", self._own / "hidden"
        self.layers: list[LayerReport] = []
        self.shards: list[str] = []
        self.start = 0
        self.seconds: dict[str, float] = {}
        self._inputs: dict[str, list[str]] = {}  # of block `start`: files by path, "hidden" and "dense_hidden"
        self._divided: int | None = None  # `Calls.divided`
        self._lock: IO | None = None
        self.complete = (self.folder / COMPLETE).exists()
        if ranks.rank() == 0:
            self._check(manifest)
            if not self.complete:
                check_new(self.output, besides=inside.name)
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = lock(self.folder / LOCK)
            if self.complete and not self.checkpoint.exists() and not self.output.exists():
                # The last run was killed when it tidied up, and its output was taken away since.
                for folder in (self._state, self._hidden):
                    shutil.rmtree(folder, ignore_errors=True)
                (self.folder / COMPLETE).unlink()
                self.complete = False
        self.complete = ranks.gathered(self.complete)[0]
        if not self.complete:
            self._open(manifest)

    def _check(self, manifest: dict[str, Any]) -> None:
        path = self.folder / MANIFEST
        found = list(differences(read_json(path), manifest)) if path.exists() else []
        if found:
            raise ValueError(
                f"{self.folder} holds an unfinished run that differs from this one: {'; '.join(found[:4])}. Run with "
                "what it was begun with to go on, or remove that folder to begin again."
            )

    def _open(self, manifest: dict[str, Any]) -> None:
        for folder in (self._state, self._hidden):
            folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir()
        if ranks.rank() == 0:
            self.checkpoint.mkdir(exist_ok=True)
            if not (self.folder / MANIFEST).exists():
                with atomically(self.folder / MANIFEST) as temporary:
                    temporary.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        done = next(block for block in itertools.count() if not self._record(block).exists())
        finished = min(ranks.gathered(done))  # by all processes: some may have noted one more
        for block in range(finished, done):
            self._record(block).unlink()
        while self.start < finished:
            content = json.loads(self._record(self.start).read_text(encoding="utf-8"))
            self.layers += [LayerReport(**layer) for layer in content["layers"]]
            self.shards += content["shards"]
            self.seconds, self._inputs, self._divided = content["seconds"], content["inputs"], content["divided"]
            self.start += 1
        used = {name for names in self._inputs.values() for name in names}
        for file in self._hidden.iterdir():  # of the block in which the last run ended
            if file.name not in used:
                file.unlink()

    def _record(self, block: int) -> Path:
        return self._state / f"block-{block:05d}.json"

    def kept(self, name: str, compute: Callable[[], Any]) -> Any:
        """`compute()`, made of tensors, numbers, strings, lists and dicts; from its file if a run had it before."""
        path = self._state / f"{name}.pt"
        if not all(ranks.gathered(path.exists())):
            value = compute()
            with atomically(path) as temporary:
                torch.save(value, temporary)
            return value
        return torch.load(path, weights_only=True, mmap=True)

    def hidden(self) -> "Spilled":
        """Empty, for the inputs of a block."""
        return Spilled(self._hidden)

    def go_on(self, calls: Calls) -> None:
        """Put the inputs of block `start` into `calls`, which were recorded again."""
        if calls.share_state:  # what the finished blocks handed on is lost
            while self.start:
                self.start -= 1
                self._record(self.start).unlink()
            self.layers, self.shards, self.seconds = [], [], {}
        elif self.start:
            device = calls.hidden[0].device
            paths = {
                name: Spilled(self._hidden, [Stored(self._hidden / file, device) for file in files])
                for name, files in self._inputs.items()
            }
            for path in paths.values():
                path.keep()
            calls.hidden, calls.dense_hidden = paths["hidden"], paths.get("dense_hidden")
            if self._divided is not None:  # a part's sums are in an order of their own
                calls.divide(self._divided)

    def end_block(
        self, layers: list[LayerReport], shards: list[str], calls: Calls | None, seconds: dict[str, float]
    ) -> None:
        """Note that block `start` is done.

        Args:
            shards: its files, which are in `checkpoint`.
            calls: with the inputs of the next block.
        """
        paths = {} if calls is None else {"hidden": calls.hidden, "dense_hidden": calls.dense_hidden}
        inputs = {name: path.keep() for name, path in paths.items() if isinstance(path, Spilled)}
        sync(self._hidden)
        content = {
            "layers": [asdict(layer) for layer in layers],
            "shards": shards,
            "inputs": inputs,
            "divided": None if calls is None else calls.divided,
            "seconds": seconds,
        }
        with atomically(self._record(self.start)) as temporary:
            temporary.write_text(json.dumps(content), encoding="utf-8")
        ranks.gathered(None)  # before all have noted it, the last inputs may be needed again
        used = {name for names in inputs.values() for name in names}
        for name in {name for names in self._inputs.values() for name in names} - used:
            (self._hidden / name).unlink()
        self._inputs = inputs
        self.layers += layers
        self.shards += shards
        self.start += 1

    def saving(self) -> AbstractContextManager:
        """What autograd saves inside is in files until it is used."""
        return torch.autograd.graph.saved_tensors_hooks(lambda x: Stored.write(x, self.scratch), Stored.read)

    def close(self) -> None:
        """Let another run go on with what is there."""
        if self._lock is not None:
            self._lock.close()

    def fail(self, error: BaseException) -> str | None:
        """After an error: how to go on; None, and no trace is left, if there is nothing worth it."""
        begun = {path.stem for path in self._state.glob("*.pt")} - {"tokens"}
        if self.start == 0 and (not begun or isinstance(error, ValueError)):  # which the same run would come to again
            shutil.rmtree(self._own, ignore_errors=True)
            return None
        shutil.rmtree(self.scratch, ignore_errors=True)
        if ranks.rank() > 0:
            return None
        done = f"{self.start} block{'' if self.start == 1 else 's'}" if self.start else "what comes before the blocks"
        if isinstance(error, ValueError):
            return f"{done} done, and kept in {self.folder}; the same run would end here again: remove that folder."
        return (
            f"{done} done, and kept in {self.folder}: the same run goes on from there; before one with any change, "
            "remove that folder."
        )

    def publish(self) -> None:
        """Make the output of `checkpoint`. Can be called again after a crash."""
        with ranks.together():
            if not self.complete and ranks.rank() == 0:
                sync(self.checkpoint)
                with atomically(self.folder / COMPLETE) as temporary:
                    temporary.touch()
        with ranks.together():
            if ranks.rank() > 0:
                shutil.rmtree(self._own, ignore_errors=True)
                with contextlib.suppress(OSError):  # nothing else is in it on another machine
                    self.folder.rmdir()
        with ranks.together():
            if ranks.rank() == 0:
                self._move()

    def _move(self) -> None:
        if self.folder.parent == self.output:  # it existed before: it may be a mount or a link, and stays
            for path in sorted(self.checkpoint.iterdir(), key=lambda path: path.name == "config.json"):
                os.replace(path, self.output / path.name)
            sync(self.output)
        elif self.checkpoint.exists():
            os.replace(self.checkpoint, self.output)
            sync(self.output.parent)
        for name in ("checkpoint", "state", "hidden", "scratch"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        for name in (MANIFEST, COMPLETE, LOCK):
            (self.folder / name).unlink(missing_ok=True)
        self.folder.rmdir()


def lock(path: Path) -> IO:
    """A file that no other process holds, until it is closed or this process ends, however it does.

    Raises:
        OSError: another one holds it.
    """
    file = path.open("w")
    try:
        import fcntl
    except ImportError:  # not on Windows
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise OSError(
            f"another process is writing to {path.parent}: wait until it is done, or choose another output."
        ) from error
    except OSError:  # not on this file system
        pass
    return file


def differences(before: Any, now: Any, name: str = "") -> Iterator[str]:
    """In words, by the dotted name of what differs in two trees of dicts."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted({*before, *now}):
            yield from differences(before.get(key), now.get(key), f"{name}.{key}".lstrip("."))
    elif before != now:
        yield f"{name} was {_short(before)} and is {_short(now)}"


def _short(value: Any, most: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."


class Stored:
    """A tensor in a file, which goes with the last reference to it unless it is kept."""

    def __init__(self, path: Path, device: torch.device):
        self.path, self.device = path, device
        self._removal = weakref.finalize(self, path.unlink, missing_ok=True)

    @classmethod
    def write(cls, x: Tensor, folder: Path) -> "Stored":
        handle, name = tempfile.mkstemp(suffix=".safetensors", dir=folder)
        os.close(handle)
        stored = cls(Path(name), x.device)
        with writing(stored.path):
            save_file({"x": x.detach().contiguous()}, name)
        return stored

    def read(self) -> Tensor:
        return load_file(self.path)["x"].to(self.device, copy=True)  # not mapped: aligned as tensors are in memory

    def keep(self) -> str:
        """The file is safe from a crash, and stays. Returns its name."""
        if self._removal.detach() is not None:
            sync(self.path)
        return self.path.name


class Spilled:
    """Tensors in files, one each; those that fit into HIDDEN_LIMIT bytes are in memory, too."""

    def __init__(self, folder: Path, stored: Sequence[Stored] = ()):
        self._folder = folder
        self._stored = list(stored)
        self._memory: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self._stored)

    def __iter__(self) -> Iterator[Tensor]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, batch: int, /) -> Tensor:
        return self._memory[batch] if batch in self._memory else self._stored[batch].read()

    def __setitem__(self, batch: int, x: Tensor, /) -> None:
        self._stored[batch] = Stored.write(x, self._folder)
        self._remember(batch, x)

    def _remember(self, batch: int, x: Tensor) -> None:
        self._memory.pop(batch, None)
        if sum(other.nbytes for other in self._memory.values()) + x.nbytes <= HIDDEN_LIMIT:
            self._memory[batch] = x

    def append(self, x: Tensor) -> None:
        self._stored.append(Stored.write(x, self._folder))
        self._remember(len(self) - 1, x)

    def __copy__(self) -> "Spilled":
        other = Spilled(self._folder, self._stored)
        other._memory = dict(self._memory)
        return other

    def keep(self) -> list[str]:
        """The names of the files, which are safe from a crash and stay."""
        return [stored.keep() for stored in self._stored]
