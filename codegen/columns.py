"""Column variables: the vector of places along the axis that a kernel's program holds or walks."""

from tilewright.codegen.index import Index, variable
from tilewright.codegen.writer import KernelWriter, Var
from tilewright.errors import CodegenError
from tilewright.ir.sizes import Size


class ColumnConflict(CodegenError):
    """A reduction would need a third axis: its place already varies along the columns of the tile."""


def next_power_of_2(size: int) -> int:
    """The least power of two that is at least ``size``."""
    return 1 << max(size - 1, 0).bit_length()


def column_block(writer: KernelWriter, size: Size) -> tuple[int, bool]:
    """Columns of a tile for an axis of ``size``, and whether a loop is needed to cover it."""
    if isinstance(size, int) and size <= writer.register_columns:
        return next_power_of_2(size), False
    return (min(writer.loop_columns, next_power_of_2(size)) if isinstance(size, int) else writer.loop_columns), True


def define_columns(
    writer: KernelWriter, name: str, size: Size, block: int, start: str | None = None, masked: bool = True
) -> Index:
    """Defines the column variable of an axis in the innermost scope: a vector of ``block`` places from ``start``.

    Without ``masked`` the caller promises that no place is past the end.
    """
    constant = f"BLOCK_{name.upper()}"
    writer.constants[constant] = block
    places = f"tl.arange(0, {constant})" + ("[None, :]" if writer.rank == 2 else "")
    writer.statement(f"{name} = {places if start is None else f'{start} + {places}'}")
    full = isinstance(size, int) and size % block == 0
    mask = None if full or not masked else f"{name}_mask"
    if mask:
        # Places that start in 64 bits are those of a tensor seen as one row, of which there may be that many.
        end = writer.wide_size(size) if start and "int64" in start else writer.size(size)
        writer.statement(f"{mask} = {name} < {end}")
    return writer.define(Var(name, size, writer.rank - 1, constant, mask))


def columns_name(writer: KernelWriter, size: Size) -> str:
    """Name of the column variable for an axis size: ``cols``, and ``cols_2`` and so on for further sizes."""
    names = writer.column_names
    if size not in names:
        names[size] = "cols" if not names else f"cols_{len(names) + 1}"
    return names[size]


def columns_in_registers(writer: KernelWriter, size: Size) -> Index:
    """The column variable of an axis that fits a tile, defined at the start of the rows' scope."""
    name = columns_name(writer, size)
    var = writer.variables.get(name)
    if var is None:
        with writer.detached(writer.row_deps):
            return define_columns(writer, name, size, column_block(writer, size)[0])
    return variable(name, size)
