"""A device is one that is there, its float32 products are float32, and freed memory is kept."""

import os
import platform
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from minibert.errors import InputError
from minibert.training import device
from minibert.training.device import keep_freed_memory, release_freed_memory, set_up_device

on_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc alone")


@pytest.fixture(autouse=True)
def precision_as_before():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def cuda_is_there(monkeypatch, request):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: request.param)


@pytest.mark.parametrize("cuda_is_there", [False], indirect=True)
def test_cuda_that_is_not_there_is_one_line(cuda_is_there):
    with pytest.raises(InputError) as refusal:
        set_up_device("cuda")
    assert str(refusal.value) == (
        "--device cuda: this machine has no CUDA device that torch can use"
    )


@pytest.mark.parametrize(
    ("cuda_is_there", "chosen"), [(False, "cpu"), (True, "cuda")], indirect=["cuda_is_there"]
)
def test_auto_is_the_gpu_where_there_is_one(cuda_is_there, chosen):
    assert set_up_device("auto") == torch.device(chosen)


@pytest.mark.parametrize("cuda_is_there", [True], indirect=True)
def test_a_gpu_computes_without_tf32_and_the_c_library_is_left_alone(cuda_is_there, monkeypatch):
    monkeypatch.setattr(device, "keep_freed_memory", lambda: pytest.fail("of a CPU alone"))
    torch.set_float32_matmul_precision("medium")
    assert set_up_device("cuda") == torch.device("cuda")
    assert torch.get_float32_matmul_precision() == "highest"


def relative_error(rows: int, inner: int, columns: int) -> float:
    """Of a float32 product of random matrices, against float64."""
    generator = torch.Generator().manual_seed(rows)
    left = torch.randn(rows, inner, generator=generator)
    right = torch.randn(inner, columns, generator=generator)
    exact = left.double() @ right.double()
    return float((left @ right - exact).norm() / exact.norm())


@pytest.mark.parametrize("sizes", [(13, 29, 17), (300, 768, 513), (1024, 1024, 1024)])
def test_a_product_on_a_cpu_is_one_of_float32(sizes):
    """bfloat16 would be 2e-3 off, TF32 3e-4."""
    assert set_up_device("cpu") == torch.device("cpu")
    assert relative_error(*sizes) < 2e-6


def test_a_cpu_that_would_round_to_bfloat16_is_told_not_to(monkeypatch):
    exact_product = torch.Tensor.__matmul__

    def product(left, right):
        medium = torch.get_float32_matmul_precision() == "medium"
        if medium and left.dtype == torch.float32:  # as oneDNN does where there are matrix units
            left, right = left.bfloat16().float(), right.bfloat16().float()
        return exact_product(left, right)

    monkeypatch.setattr(torch.Tensor, "__matmul__", product)
    torch.set_float32_matmul_precision("medium")
    assert relative_error(300, 768, 513) > 1e-3
    set_up_device("cpu")
    assert torch.get_float32_matmul_precision() == "highest"
    assert relative_error(300, 768, 513) < 2e-6


@on_glibc
def test_glibc_has_both_functions_and_takes_them(monkeypatch):
    answers = []
    of_glibc = device._of_glibc

    def recorded(name):
        function = of_glibc(name)
        return lambda *arguments: answers.append((name, arguments, function(*arguments)))

    monkeypatch.setattr(device, "_of_glibc", recorded)
    keep_freed_memory()
    release_freed_memory()
    names, arguments, accepted = zip(*answers, strict=True)
    assert names == ("mallopt", "mallopt", "malloc_trim")
    assert arguments == ((-1, -1), (-4, 0), (0,))  # M_TRIM_THRESHOLD, M_MMAP_MAX
    assert accepted[:2] == (1, 1)


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_other_systems_are_left_alone(monkeypatch, system):
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(device.ctypes, "CDLL", lambda name: pytest.fail("no such library there"))
    keep_freed_memory()
    release_freed_memory()
    assert set_up_device("cpu") == torch.device("cpu")


def test_another_c_library_of_linux_is_left_alone(monkeypatch):
    """musl has neither function."""
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(device.ctypes, "CDLL", lambda name: object())
    keep_freed_memory()
    release_freed_memory()


HELD = """
import re
from pathlib import Path
import torch
from minibert.training.device import keep_freed_memory, release_freed_memory

def held():  # bytes
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

def used_and_freed():
    tensors = [torch.ones(2**22) for _ in range(10)]  # 16 MB each

before = held()
used_and_freed()
print(held() - before)
keep_freed_memory()
used_and_freed()
print(held() - before)
release_freed_memory()
print(held() - before)
"""


@on_glibc
def test_freed_memory_is_kept_until_it_is_released():
    """160 MB of tensors, freed: as glibc has it, then kept, then released."""
    environment = {name: value for name, value in os.environ.items() if "MALLOC" not in name}
    done = subprocess.run(
        [sys.executable, "-c", HELD],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    stock, kept, released = (int(line) / 2**20 for line in done.stdout.split())
    assert stock < 40
    assert kept > 150
    assert released < 40
