"""The tour of `tools/demo`, which does the set-up, makes the folder and removes it: `demo.py FOLDER`.

Every step says in one line what it shows, runs the real command, and checks what came out. Exit status 1 if any check
failed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress_bar import ProgressBar
from rich.table import Table
from safetensors import safe_open
from safetensors.numpy import save_file

MODEL = "demo-llm"
SHARDS_COUNT = 4
_LAYERS_COUNT, _WIDTH, _INNER, _VOCABULARY = 7, 1024, 2816, 8192
_COMMAND_TIMEOUT_S = 120

console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)


class Tour:
    """The steps, in order. All paths are below `folder`, which is also where the commands run."""

    def __init__(self, folder: Path) -> None:
        self.registry = folder / "registry" / MODEL
        self.model = folder / "models" / MODEL
        self.failed_count = 0
        self._folder = folder
        self._step = 0
        self._size = 0

    def run(self) -> None:
        console.print("\n[bold]mfs[/]: model weights as ordinary files, fetched when they are read")
        for step in (
            self.make_registry, self.mount, self.read_two_tensors, self.see_what_came, self.load_everything,
            self.evict_and_prefetch, self.status, self.unmount, self.push, self.follow_a_tag,
        ):  # fmt: skip
            step()

    # -- the steps

    def make_registry(self) -> None:
        self._say("A registry", "a folder here; s3://, hf:// and https:// work the same way")
        self._size = make_model(self.registry)
        files = sorted(path.name for path in self.registry.iterdir())
        console.print(f"     registry/{MODEL}: {len(files)} files, [bold]{megabytes(self._size)}[/]")

    def mount(self) -> None:
        self._say("Mount it", "returns at once: nothing is copied")
        (self._folder / "models").mkdir()
        self._mfs("mount", "registry", "models", "--cache-dir", "cache", "--cache-size", "1G", "--ram-size", "256M")
        same = sorted(os.listdir(self.model)) == sorted(os.listdir(self.registry))
        self._check(same, f"models/{MODEL} lists the same files")

    def read_two_tensors(self) -> None:
        self._say("Read two tensors", "by plain safetensors, which knows nothing of mfs")
        index = json.loads((self.model / "model.safetensors.index.json").read_text())["weight_map"]
        names = ("model.layers.2.self_attn.q_proj.weight", "model.layers.6.self_attn.o_proj.weight")
        wanted = 0
        for name in names:
            with safe_open(self.model / index[name], framework="numpy") as file:
                tensor = file.get_tensor(name)
            with safe_open(self.registry / index[name], framework="numpy") as file:
                same = np.array_equal(tensor, file.get_tensor(name))
            wanted += tensor.nbytes
            self._check(same, f"{name} {list(tensor.shape)} {tensor.dtype}")
        fetched = self._fetched_bytes()
        self._bar(fetched, f"fetched {megabytes(fetched)} of {megabytes(self._size)} to read {megabytes(wanted)}")
        self._check(0 < fetched < self._size / 4, "only what was needed, and the few MB the kernel reads around it")

    def see_what_came(self) -> None:
        self._say("See what is here", "and what each file is, without fetching anything")
        self._mfs("ls", f"models/{MODEL}")
        shard = self.model / shard_name(1)
        console.print(f"   [dim]$[/] [bold]getfattr -d {shard.relative_to(self._folder)}[/]")
        facts = {name: os.getxattr(shard, name).decode() for name in os.listxattr(shard)}
        for name, value in facts.items():
            value = value.replace(f"{self._folder}/", "")
            console.print(f"     {name}={json.dumps(value)}", markup=False, soft_wrap=True)
        self._check("user.mfs.revision" in facts, "the revision it is bound to is among them")

    def load_everything(self) -> None:
        self._say("Load the whole model", "and compare every tensor and file with the registry's")
        start, size, count, different = time.perf_counter(), 0, 0, []
        for original in sorted(self.registry.iterdir()):
            if original.suffix != ".safetensors":
                if (self.model / original.name).read_bytes() != original.read_bytes():
                    different.append(original.name)
                continue
            with (
                safe_open(self.model / original.name, framework="numpy") as file,
                safe_open(original, framework="numpy") as truth,
            ):
                for name in file.keys():  # noqa: SIM118  # not a dict
                    tensor = file.get_tensor(name)
                    size, count = size + tensor.nbytes, count + 1
                    if not np.array_equal(tensor, truth.get_tensor(name)):
                        different.append(name)
        seconds = time.perf_counter() - start
        text = f"{count} tensors, {megabytes(size)}, byte for byte the same, in {seconds:.1f} s"
        self._check(not different, text if not different else f"these differ: {', '.join(different)}")
        self._bar(self._fetched_bytes(), f"fetched {megabytes(self._fetched_bytes())}: each byte once")
        whole = self._wait_for(lambda: self._resident_bytes() >= self._size)
        self._check(whole, "and all of it is on the SSD now, for the next process and after a restart")

    def evict_and_prefetch(self) -> None:
        self._say("Make room, and bring it back", "before somebody needs it")
        self._mfs("evict", f"models/{MODEL}")
        self._check(self._resident_bytes() == 0, "nothing of it is resident any more")
        self._mfs("prefetch", f"models/{MODEL}")
        self._check(self._resident_bytes() >= self._size, "all of it is")

    def status(self) -> None:
        self._say("How is it doing?", "tiers, origin, warnings; --watch keeps it up to date")
        self._mfs("status", "models")

    def unmount(self) -> None:
        self._say("Unmount", "the SSD tier would keep its bytes; the demo removes everything")
        self._mfs("umount", "models")
        mounted = f" {self._folder}/models " in Path("/proc/mounts").read_text()
        self._check(not mounted, "gone")

    def push(self) -> None:
        self._say("A registry that keeps versions", "on a folder here; mfs+s3:// works the same way")
        self._mfs("push", f"registry/{MODEL}", self._address("v1"))
        fine_tune(self.registry)
        self._mfs("push", f"registry/{MODEL}", self._address("v2"), "--base", f"{MODEL}:v1")
        self._mfs("diff", self._address("v1"), self._address("v2"))
        stored = sum(path.stat().st_size for path in (self._folder / "store").rglob("*") if path.is_file())
        self._check(
            stored < 1.3 * self._size, f"two versions of {megabytes(self._size)} are stored in {megabytes(stored)}"
        )

    def follow_a_tag(self) -> None:
        self._say("A tag that moves", "and a mount that follows it")
        self._mfs("tag", self._address("v1"), "prod")
        self._mfs("mount", f"mfs+file://{self._folder}/store", "models", "--cache-dir", "cache", "--ram-size", "256M")
        shown = self.model / "prod" / shard_name(1)
        before = shown.read_bytes()
        self._mfs("tag", self._address("v2"), "prod")
        self._mfs("refresh", "models")
        same = shown.read_bytes() == (self.registry / shard_name(1)).read_bytes() != before
        self._check(same, "prod shows version 2, byte for byte")
        self._mfs("rollback", self._address("prod"))
        self._mfs("refresh", "models")
        self._check(shown.read_bytes() == before, "and version 1 again, from the cache")
        self._mfs("umount", "models")

    def _address(self, tag: str) -> str:
        return f"mfs+file://{self._folder}/store/{MODEL}:{tag}"

    # -- showing and checking

    def _say(self, title: str, why: str) -> None:
        self._step += 1
        console.print(f"\n[bold cyan]{self._step}[/]  [bold]{title}[/] [dim]– {why}[/]")

    def _check(self, good: bool, text: str) -> None:
        self.failed_count += not good
        console.print("   [green]✓[/]" if good else "   [bold red]✗[/]", text)

    def _bar(self, part: int, text: str) -> None:
        line = Table.grid(padding=(0, 1))
        share = min(1.0, part / self._size)
        line.add_row(
            "  ", ProgressBar(total=1.0, completed=share, width=24, complete_style="cyan"), f"{share:4.0%}", text
        )
        console.print(line)

    def _mfs(self, *words: str) -> None:
        """Show and run an `mfs` command; its output is its own. Ends the tour if it fails."""
        shown = " ".join(words).replace(f"{self._folder}", "…")
        console.print(f"   [dim]$[/] [bold]mfs {shown}[/]")
        sys.stdout.flush()
        # Its stderr is ours, so that progress bars are bars; its stdout is indented.
        done = subprocess.run(
            self._command(words), cwd=self._folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
            timeout=_COMMAND_TIMEOUT_S,
        )  # fmt: skip
        for line in done.stdout.splitlines():
            console.print(f"     {line.replace(f'{self._folder}/', '')}", markup=False, soft_wrap=True)
        if done.returncode:
            console.print(f"   [bold red]✗[/] mfs {words[0]} ended with status {done.returncode}")
            raise SystemExit(1)

    def _ask(self, *words: str) -> Any:
        out = subprocess.run(
            self._command(words), cwd=self._folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=True,
            timeout=_COMMAND_TIMEOUT_S,
        ).stdout  # fmt: skip
        return json.loads(out)

    @staticmethod
    def _command(words: tuple[str, ...]) -> list[str]:
        return [sys.executable, "-P", "-m", "mfs", *words]

    def _fetched_bytes(self) -> int:
        return int(self._ask("status", "--json", "models")["origin"]["fetched_bytes"])

    def _resident_bytes(self) -> int:
        return sum(row["ssd_bytes"] for row in self._ask("ls", "--json", f"models/{MODEL}"))

    @staticmethod
    def _wait_for(condition: Callable[[], bool], timeout_s: float = 30) -> bool:
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline_s:
                return False
            time.sleep(0.2)
        return True


def make_model(folder: Path) -> int:
    """Write a small model as transformers lays it out, the same bytes every time; returns its size."""
    random = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (_VOCABULARY, _WIDTH)}
    for layer in range(_LAYERS_COUNT):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.self_attn.{which}_proj.weight": (_WIDTH, _WIDTH) for which in "qkvo"}
        shapes |= {f"{prefix}.mlp.{which}_proj.weight": (_INNER, _WIDTH) for which in ("gate", "up")}
        shapes |= {f"{prefix}.mlp.down_proj.weight": (_WIDTH, _INNER), f"{prefix}.input_layernorm.weight": (_WIDTH,)}
    folder.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    names, total = list(shapes), 0
    per_shard = -(-len(names) // SHARDS_COUNT)
    for number in range(SHARDS_COUNT):
        part = names[number * per_shard : (number + 1) * per_shard]
        tensors = {name: random.standard_normal(shapes[name], dtype=np.float32).astype(np.float16) for name in part}
        save_file(tensors, folder / shard_name(number + 1))
        weight_map |= dict.fromkeys(part, shard_name(number + 1))
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    config = {"architectures": ["DemoForCausalLM"], "hidden_size": _WIDTH, "num_hidden_layers": _LAYERS_COUNT}
    vocabulary = {f"token{number}": number for number in range(_VOCABULARY)}
    tokenizer = {"version": "1.0", "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "token0"}}
    for name, value in (("model.safetensors.index", index), ("config", config), ("tokenizer", tokenizer)):
        (folder / f"{name}.json").write_text(json.dumps(value, indent=1))
    return sum(path.stat().st_size for path in folder.iterdir())


def fine_tune(folder: Path) -> None:
    """Change a model as training does: in one shard, each weight by a little."""
    random = np.random.default_rng(1)
    with safe_open(folder / shard_name(1), framework="numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    tuned = {name: t + (1e-3 * random.standard_normal(t.shape)).astype(t.dtype) for name, t in tensors.items()}
    save_file(tuned, folder / shard_name(1))


def shard_name(number: int) -> str:
    return f"model-{number:05d}-of-{SHARDS_COUNT:05d}.safetensors"


def megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size < 1e8 else f"{size / 1e6:.0f} MB"


def main() -> None:
    folder = Path(sys.argv[1])
    os.environ["MFS_RUNTIME_DIR"] = str(folder / "run")
    tour = Tour(folder)
    try:
        tour.run()
    except KeyboardInterrupt:
        sys.exit("demo: interrupted; everything is taken away again")
    if tour.failed_count:
        console.print(f"\n[bold red]{tour.failed_count} of the checks failed[/]")
        sys.exit(1)
    console.print("\n[bold green]All checks passed.[/] Next: mfs mount --help, and README.md for S3 and the Hub.\n")


if __name__ == "__main__":
    main()
