"""Runs a function of a loaded library on an emulated processor that has AVX-512, whatever the real one has (bochscpu).

The emulated processor sees the memory of this process at its own addresses, read on demand, so that a function finds its
arguments, its library and the C library where they are. It must not allocate: the heap belongs to the emulator.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import bochscpu
import bochscpu.cpu
from bochscpu import memory

PAGE, GIB = 2**12, 2**30
STACK = 2**20
HALT = b"\xf4"
USER_HALF = 2**47  # addresses beyond are the kernel's
# Intel SDM, volume 3. Page table entries: present, writable, of any privilege; of 1 GiB.
TABLE, LARGE_PAGE = 0x7, 0x87
CR0 = 0x80050033  # protected mode with paging
CR4 = 0x00040620  # PAE, SSE with its exceptions, XSAVE
EFER_LONG_MODE = 0x500
XCR0_AVX512 = 0xE7  # x87, SSE, AVX, and AVX-512's masks and registers
MXCSR_ALL_MASKED = 0x1F80
CODE_64, DATA = 0xA09B, 0xC093  # segment attributes


class EmulationError(RuntimeError):
    """The emulated function did not return."""


class EmulatedProcessor:
    """A processor. Every GiB of addresses that this process uses is one of its physical memory, the same for all calls."""

    _windows: ClassVar[dict[int, int]] = {}  # the how manieth GiB of virtual addresses -> of physical ones

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, STACK + 257 * PAGE)
        self._stack = _address_of(self._memory)
        self._tables, self._halt = self._stack + STACK, self._stack + STACK - PAGE
        self._memory[STACK - PAGE : STACK - PAGE + 1] = HALT

    def call(self, function: Any, *arguments: int) -> None:
        """Call a ctypes function with up to two integers or addresses; what it returns is lost.

        Raises:
            EmulationError: the processor raised an exception, such as for an instruction that it does not have.
        """
        for begin, end in _mapped():
            for window in range(begin // GIB, (end - 1) // GIB + 1):
                # From 4 GiB on: below, there are devices.
                self._windows.setdefault(window, 4 + len(self._windows))
        virtual = {physical: window for window, physical in self._windows.items()}
        failures: list[str] = []
        session = bochscpu.Session()

        def provide(physical: int) -> None:
            page = physical & -PAGE
            memory.page_insert(page, virtual[page // GIB] * GIB + page % GIB)

        def fail(session: Any, _: int, vector: int, code: int) -> None:
            state = session.cpu.state
            failures.append(f"exception {vector} ({code}) at {state.rip:#x}, address {state.cr2:#x}")
            session.stop()

        hook = bochscpu.Hook()
        hook.exception, hook.hlt = fail, lambda session, _: session.stop()
        hook.reset = lambda *_: None
        session.missing_page_handler = provide
        session.cpu.state = self._state(ctypes.cast(function, ctypes.c_void_p).value or 0, *arguments)
        session.run([hook])
        if failures:
            raise EmulationError(failures[0])

    def _state(self, entry: int, *arguments: int) -> Any:
        state = bochscpu.State()
        bochscpu.cpu.set_long_mode(state)
        state.cr0, state.cr3, state.cr4, state.efer = CR0, self._page_tables(), CR4, EFER_LONG_MODE
        state.xcr0, state.mxcsr, state.mxcsr_mask, state.rflags = XCR0_AVX512, MXCSR_ALL_MASKED, 0xFFFF, 0x2
        thread = ctypes.CDLL(None).pthread_self
        thread.restype = ctypes.c_uint64
        state.cs = _segment(8, CODE_64)
        for name in ("ss", "ds", "es", "gs"):
            setattr(state, name, _segment(16, DATA))
        state.fs = _segment(16, DATA, base=thread())  # thread-local variables, as errno
        top = self._halt - 64 - 8  # as behind a call: 16-byte boundaries lie 8 bytes above
        ctypes.c_uint64.from_address(top).value = self._halt
        state.rsp, state.rip = top, entry
        for register, value in zip(("rdi", "rsi"), arguments, strict=False):
            setattr(state, register, value)
        return state

    def _page_tables(self) -> int:
        """The physical address of tables that show each window at the place where this process has it."""
        root, entries = [0] * 512, {}
        for window, physical in self._windows.items():
            entries.setdefault(window // 512, [0] * 512)[window % 512] = physical * GIB | LARGE_PAGE
        for number, (index, table) in enumerate(entries.items(), start=1):
            root[index] = self._physical(self._tables + number * PAGE) | TABLE
            self._write(self._tables + number * PAGE, table)
        self._write(self._tables, root)
        return self._physical(self._tables)

    def _physical(self, address: int) -> int:
        return self._windows[address // GIB] * GIB + address % GIB

    def _write(self, address: int, table: list[int]) -> None:
        offset = address - self._stack
        self._memory[offset : offset + PAGE] = struct.pack("<512Q", *table)


def _mapped() -> Iterator[tuple[int, int]]:
    """Every readable range of addresses of this process."""
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        addresses, permissions = line.split()[:2]
        begin, end = (int(address, 16) for address in addresses.split("-"))
        if permissions.startswith("r") and begin < USER_HALF:
            yield begin, end


def _address_of(block: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(block))


def _segment(selector: int, attributes: int, base: int = 0) -> Any:
    segment = bochscpu.Segment()
    segment.present, segment.selector, segment.attr = True, selector, attributes
    segment.base, segment.limit = base, 2**32 - 1
    return segment
