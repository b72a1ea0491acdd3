from collections.abc import Callable

class UnpackException(Exception): ...

def packb(o: object, *, default: Callable[[object], object] | None = None, use_bin_type: bool = True) -> bytes: ...
def unpackb(
    packed: bytes | bytearray | memoryview,
    *,
    raw: bool = False,
    strict_map_key: bool = True,
    list_hook: Callable[[list[object]], object] | None = None,
    object_hook: Callable[[dict[object, object]], object] | None = None,
    max_array_len: int = -1,
    max_map_len: int = -1,
    max_ext_len: int = -1,
) -> object: ...
