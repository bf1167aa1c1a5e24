"""The compiled extension (csrc/module.cpp). Addresses are `data_ptr()` of contiguous CPU tensors; types 0 float32,
1 bfloat16, 2 float16; `nested` is 0 where scales are float32."""

def paths() -> list[str]: ...
def path() -> str: ...
def use_path(name: str) -> None: ...
def runtime() -> str: ...
def set_tables(
    levels: list[float], borders: list[float], dynamic_map: list[float], dynamic_borders: list[float]
) -> None: ...
def dequantize(
    packed: int,
    scales: int,
    nested: int,
    offset: float,
    nested_block: int,
    count: int,
    block: int,
    dtype: int,
    out: int,
    threads: int,
) -> None: ...
def quantize(x: int, dtype: int, count: int, block: int, packed: int, scales: int, threads: int) -> None: ...
def quantize_scales(
    scales: int, offset: float, count: int, block: int, codes: int, nested: int, threads: int
) -> None: ...
def multiply_rows(
    x: int,
    packed: int,
    scales: int,
    nested: int,
    offset: float,
    nested_block: int,
    y: int,
    rows: int,
    n: int,
    k: int,
    block: int,
    threads: int,
) -> None: ...
