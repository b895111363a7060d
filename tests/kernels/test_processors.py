"""lib/kernels/mixer.cpp for other vectors and processors computes what it computes here."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from lib.kernels import cpu
from tests.kernels.test_engine import compiled

PROGRAM = Path(__file__).with_name("every_function.cpp")
L, REAL, D, N = 45, 40, 64, 128
TARGETS = {
    "4 lanes": ("c++", ["-DLANES=4"], []),
    "8 lanes": ("c++", ["-DLANES=8"], []),
    "16 lanes": ("c++", ["-DLANES=16"], []),
    "no processor in particular": ("c++", None, []),
    "Clang": ("clang++", [], []),
    "aarch64": ("aarch64-linux-gnu-g++", None, ["qemu-aarch64"]),
    "aarch64, 4 lanes": ("aarch64-linux-gnu-g++", ["-DLANES=4"], ["qemu-aarch64"]),
}


def program(target: str, folder: Path) -> list[str]:
    """The command that runs every_function.cpp; a missing compiler or emulator skips the test."""
    compiler, options, emulator = TARGETS[target]
    for tool in (compiler, *emulator):
        if not shutil.which(tool):
            pytest.skip(f"{tool} is not installed")
    own = [] if emulator or options is None else cpu.processor_flags()
    flags = [flag for flag in cpu.FLAGS.split() if flag not in ("-fPIC", "-shared")]
    made = folder / "every_function"
    command = [compiler, *flags, *own, *(options or []), str(PROGRAM), "-o", str(made)]
    subprocess.run([*command, *(["-static"] if emulator else [])], check=True)
    return [*emulator, str(made)]


def inputs() -> dict[str, list[torch.Tensor]]:
    """What the program reads, in its order; a text of 45 positions, of which 40 are tokens."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "time": [torch.linspace(0, 1, L)],
        "delta": [draw(D)],
        "filters": [draw(L, D), draw(L, D), draw(L, D), draw(L, D), draw(D), draw(D)],
        "short": [draw(3, 3 * D), draw(3 * D)],
        "float32": [draw(L, 3 * D), draw(L, D), draw(L, D)],
        "bfloat16": [draw(L, 3 * D), draw(L, D), draw(L, D)],
    }


def here(given: dict, dtype: torch.dtype) -> list[torch.Tensor]:
    """The results of the library that this process uses, in the order of the program."""
    (time,), (delta,), short = given["time"], given["delta"], given["short"]
    back, ahead, back2, ahead2, gain, gain2 = given["filters"]
    filters = [back, ahead, gain, back2, ahead2, gain2]
    p, u, dy = (x.to(dtype) for x in given[str(dtype).removeprefix("torch.")])
    starts, real, y, c1 = (
        torch.tensor([0, L]),
        torch.tensor([REAL]),
        *torch.empty(2, L, D).to(dtype),
    )
    cpu.mix(p, u, starts, *short, [cpu.spectra(filters, time, delta, N, dtype)], real, c1, y)
    table = cpu.spectra(filters, time, delta, N).values
    dp, du, dtable = torch.empty_like(p), torch.empty_like(u), torch.zeros_like(table)
    dw, db = map(torch.zeros_like, short)
    name = "f32" if dtype == torch.float32 else "bf16"
    gradients = (dp, du, starts, real, 1, D, *short, table, dtable, dw, db, cpu.plan(N))
    cpu.call(f"mix_gradient_{name}", p, u, c1, dy, *gradients)
    grads = [torch.empty_like(part) for part in filters]
    pointers = cpu.filter_pointers(grads)
    cpu.call("spectra_gradient", *pointers, time, delta, L, D, dtable, cpu.plan(N))
    back, ahead, gain, back2, ahead2, gain2 = grads
    found = [y, c1, dp, du, dw, db, back, ahead, back2, ahead2, gain, gain2, cpu.glu(u, dy)]
    found += cpu.glu_gradient(u, c1, dy.clone())
    norm = torch.nn.LayerNorm(D, eps=1e-12)
    norm.weight.data, norm.bias.data = short[0].flatten()[:D], delta
    return [*found, cpu.add_norm(u, dy, short[1][:D].contiguous(), norm, torch.empty_like(u))]


@compiled
@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_function_gives_the_same_numbers(target, tmp_path):
    given = inputs()
    numbers = torch.cat([x.flatten() for name in given for x in padded(given[name])])
    command = program(target, tmp_path)
    done = subprocess.run(command, input=numbers.numpy().tobytes(), stdout=-1, check=True)
    found = torch.frombuffer(bytearray(done.stdout), dtype=torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        for number, expected in enumerate(here(given, dtype)):
            part, found = found[: expected.numel()].view_as(expected), found[expected.numel() :]
            close = 2e-6 if expected.dtype == torch.float32 and dtype == torch.float32 else 2.0**-7
            size = float(expected.abs().max())
            torch.testing.assert_close(
                part, expected.float(), rtol=close, atol=close * size, msg=f"result {number}"
            )
    assert not len(found)


def padded(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The program reads whole vectors."""
    return [torch.nn.functional.pad(x.flatten(), (0, -x.numel() % 16)) for x in tensors]
