"""From a cubin to a running kernel: load, raise dynamic shared memory, launch with one Params POD on torch's stream.

A kernel takes one `__grid_constant__` struct; its Python side is a ctypes.Structure of the same fields. Pointers are
those of torch tensors. cuLaunchKernelEx is used directly: higher-level launchers refuse structs by value.
"""

from __future__ import annotations

import ctypes
import re
import sys
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch

from megaproof.toolchain.errors import EnvironmentMissing, LaunchError

MIN_CUDA_DRIVER = 13000
"""cuDriverGetVersion of driver 580, the first that loads CUDA 13 cubins."""
STATIC_SHARED_LIMIT = 48 * 1024
"""Dynamic shared memory above this is asked for with cuKernelSetAttribute."""
INVALID_CONTEXT = 201
"""CUDA_ERROR_INVALID_CONTEXT: what a thread gets that has not used the device yet."""
_ONE_POINTER = ctypes.c_void_p * 1


@dataclass(frozen=True)
class Device:
    """The chip at hand: torch's index, name, short chip name ('H200'), SM count, driver version, bytes of memory."""

    index: int
    name: str
    chip: str
    sms: int
    driver: str
    memory: int = sys.maxsize


def chip_name(device_name: str) -> str:
    """'NVIDIA H100 80GB HBM3' -> 'H100'. A name without a chip of this form is returned whole, without 'NVIDIA'."""
    match = re.search(r"\b(?:G?H)\d+\b", device_name)
    return match[0] if match else device_name.removeprefix("NVIDIA ").strip()


def driver_version() -> str:
    """The driver's version such as '580.159.04', or 'unknown' where NVML does not answer."""
    try:
        from cuda.bindings import nvml

        nvml.init_v2()
        return str(nvml.system_get_driver_version())
    except Exception:
        return "unknown"


def require_device(index: int | None = None) -> Device:
    """The current CUDA device, checked once: SM90 and a driver for CUDA 13. Raises EnvironmentMissing, one sentence."""
    if not torch.cuda.is_available():
        raise EnvironmentMissing(
            "no CUDA device is visible to torch; this needs a Hopper GPU (SM90) and driver 580 or later; "
            "all that needs no GPU still works"
        )
    device = _device(torch.cuda.current_device() if index is None else index)
    _use_context(device.index)
    return device


@cache
def _device(index: int) -> Device:
    driver = _driver()
    version = _check(driver.cuDriverGetVersion(), "cuDriverGetVersion")
    if version < MIN_CUDA_DRIVER:
        supported = f"CUDA {version // 1000}.{version % 1000 // 10}"
        raise EnvironmentMissing(
            f"the driver ({driver_version()}) supports {supported}; cubins of CUDA 13 need driver 580 or later"
        )
    properties = torch.cuda.get_device_properties(index)
    if (properties.major, properties.minor) != (9, 0):
        found = f"{properties.name}, SM{properties.major}{properties.minor}"
        raise EnvironmentMissing(
            f"device {index} is a {found}; the kernels are built for Hopper alone (H100, H200, H20: SM90)"
        )
    torch.cuda.init()
    torch.zeros(1, dtype=torch.uint8, device=f"cuda:{index}")  # makes the primary context
    name, sms, memory = properties.name, properties.multi_processor_count, properties.total_memory
    return Device(index, name, chip_name(name), sms, driver_version(), memory)


class Library:
    """A loaded cubin. `kernel(name)` gives its kernels; it stays loaded as long as the process."""

    def __init__(self, cubin: bytes) -> None:
        require_device()
        self._cubin = cubin  # the driver may read it until the first launch
        load = _driver().cuLibraryLoadData(cubin, None, None, 0, None, None, 0)
        self._library = _check(load, "cuLibraryLoadData")
        self._kernels: dict[str, Kernel] = {}

    def kernel(self, name: str) -> Kernel:
        """Raises LaunchError when the cubin has no kernel of this name."""
        if name not in self._kernels:
            handle = _driver().cuLibraryGetKernel(self._library, name.encode())
            self._kernels[name] = Kernel(name, _check(handle, f"cuLibraryGetKernel({name})"))
        return self._kernels[name]


class Kernel:
    """One kernel of a library: `kernel(params, grid, block, shared)`."""

    def __init__(self, name: str, handle: Any) -> None:
        self.name = name
        self._handle = handle
        self._function = _driver().CUfunction(int(handle))  # cuLaunchKernelEx takes a CUkernel cast to CUfunction
        self._shared: dict[int, int] = {}

    def __call__(
        self,
        params: ctypes.Structure,
        grid: int,
        block: int,
        shared: int = 0,
        cooperative: bool = False,
        device: int | None = None,
        stream: int | None = None,
    ) -> None:
        """Launches on torch's current stream and returns at once.

        params: the one argument, copied by the driver during the call. grid, block: along x. shared: dynamic bytes.
        cooperative: every block resident at once, or the launch fails. device, stream: the current ones, where the
        caller knows them. Raises LaunchError.
        """
        if device is None:
            device = torch.cuda.current_device()
        if shared > self._shared.get(device, STATIC_SHARED_LIMIT):
            self._allow_shared(device, shared)
        config = _launch_config(grid, block, shared, cooperative, current_stream(device) if stream is None else stream)
        pointers = _ONE_POINTER(ctypes.addressof(params))  # kernelParams: void*[1]
        launch = _driver().cuLaunchKernelEx
        result = launch(config, self._function, ctypes.addressof(pointers), 0)
        if result[0] == INVALID_CONTEXT:
            _use_context(device)
            result = launch(config, self._function, ctypes.addressof(pointers), 0)
        if result[0]:
            _check(result, f"cuLaunchKernelEx({self.name}, grid {grid}, block {block}, shared {shared})")

    def _allow_shared(self, device: int, shared: int) -> None:
        driver = _driver()
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        result = driver.cuKernelSetAttribute(attribute, shared, self._handle, driver.CUdevice(device))
        _check(result, f"cuKernelSetAttribute({self.name}, {shared} bytes)")
        self._shared[device] = shared


@lru_cache(maxsize=256)
def _launch_config(grid: int, block: int, shared: int, cooperative: bool, stream: int) -> Any:
    """One for each stream, never changed: a launch releases the GIL, so a shared one could change under it."""
    driver = _driver()
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = grid, 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = block, 1, 1
    config.sharedMemBytes = shared
    config.hStream = driver.CUstream(stream)
    if cooperative:
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_COOPERATIVE
        attribute.value.cooperative = 1
        config.attrs = [attribute]
        config.numAttrs = 1
    return config


def _public_raw_stream(device: int) -> int:
    return torch.cuda.current_stream(device).cuda_stream


current_stream = getattr(torch._C, "_cuda_getCurrentRawStream", _public_raw_stream)
"""The handle of torch's current stream of a device; the private function makes no Stream object."""


def capture_of(stream: int, device: int) -> int:
    """The number of the CUDA graph capture that a stream is in, never used twice; 0 where it runs what it is given."""
    driver = _driver()
    _use_context(device)
    code, status, number, *_ = driver.cuStreamGetCaptureInfo(driver.CUstream(stream))
    _check((code,), "cuStreamGetCaptureInfo")
    return int(number) if status == driver.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_ACTIVE else 0


def wait_for(stream: int, before: int, device: int) -> None:
    """What a stream is given from now on begins after all that another one was given so far; the host waits for none.

    Both run what they are given, or both are in one capture: then it is an edge of the graph. Raises LaunchError.
    """
    driver = _driver()
    _use_context(device)
    event = _check(driver.cuEventCreate(int(driver.CUevent_flags.CU_EVENT_DISABLE_TIMING)), "cuEventCreate")
    try:
        _check(driver.cuEventRecord(event, driver.CUstream(before)), "cuEventRecord")
        _check(driver.cuStreamWaitEvent(driver.CUstream(stream), event, 0), "cuStreamWaitEvent")
    finally:
        driver.cuEventDestroy(event)  # its record and the wait for it stay


def _use_context(device: int) -> None:
    """Makes the primary context, torch's own, current in a thread that has none; legal while a graph is captured."""
    driver = _driver()
    if int(_check(driver.cuCtxGetCurrent(), "cuCtxGetCurrent")):
        return
    context = _check(driver.cuDevicePrimaryCtxRetain(driver.CUdevice(device)), "cuDevicePrimaryCtxRetain")
    _check(driver.cuCtxSetCurrent(context), "cuCtxSetCurrent")


class TensorMap(ctypes.Structure):
    """A CUtensorMap: 128 bytes that TMA reads, `ptx::TensorMap` in the sources. The first member of its struct."""

    _fields_ = (("opaque", ctypes.c_uint64 * 16),)


def tensor_map(tensor: torch.Tensor, box_rows: int) -> TensorMap:
    """The map of a byte matrix whose boxes are box_rows x 128 bytes in the 128-byte swizzle.

    tensor: uint8 [rows, columns], rows 16-byte aligned, a column step of 1. Rows beyond the end are read as zero.
    The same matrix gives the same object, which is copied where it is used and never changed. Raises LaunchError when
    the driver refuses it.
    """
    rows, columns = tensor.shape
    return _encoded(tensor.data_ptr(), rows, columns, tensor.stride(0), box_rows)


@lru_cache(maxsize=1024)
def _encoded(pointer: int, rows: int, columns: int, stride: int, box_rows: int) -> TensorMap:
    """A map holds addresses and sizes alone, so one of freed and reused memory stays right."""
    driver = _driver()
    result = driver.cuTensorMapEncodeTiled(
        driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT8,
        2,
        pointer,
        [driver.cuuint64_t(columns), driver.cuuint64_t(rows)],
        [driver.cuuint64_t(stride)],
        [driver.cuuint32_t(128), driver.cuuint32_t(box_rows)],
        [driver.cuuint32_t(1), driver.cuuint32_t(1)],
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    encoded = _check(result, f"cuTensorMapEncodeTiled(uint8 {[rows, columns]}, box {box_rows} x 128)")
    return TensorMap((ctypes.c_uint64 * 16)(*(int(word) for word in encoded.opaque)))


@cache
def _driver() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise EnvironmentMissing(f"cuda.bindings cannot be imported ({error}); install cuda-core 1.2") from error
    return driver


def _check(result: tuple[Any, ...], call: str) -> Any:
    code, *values = result
    if int(code) != 0:
        raise LaunchError(f"{call} failed: {getattr(code, 'name', code)}")
    return values[0] if values else None
