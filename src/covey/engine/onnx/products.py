"""Products of activations and the weights of a checkpoint, in the forms that the operators compute fast.

`PackedBlocks` go to `MatMulNBits`, plain floats to `Gemm`.
"""

from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from covey.checkpoints.quantization import PackedBlocks
from covey.engine.onnx.builder import FLOAT_ACCUMULATION, INT8_ACCUMULATION, GraphBuilder
from covey.engine.onnx.folding import DIGITS, filling, fold
from covey.engine.onnx.kernel_file import KernelFile
from covey.engine.onnx.weights import Linear, Matrix

BYTE_BITS: Final = 8


class Products:
    """Adds products to a builder."""

    def __init__(self, builder: GraphBuilder, file: KernelFile | None, *, is_exact: bool) -> None:
        """`file`: takes the matrices for 8-bit activations, as far as it can."""
        self._builder = builder
        self._file = None if is_exact else file
        self._accuracy_level = FLOAT_ACCUMULATION if is_exact else INT8_ACCUMULATION

    def linears(self, name: str, source: str, linears: tuple[Linear, ...]) -> list[str]:
        """The products with all matrices, and their biases added."""
        results = self.matmuls(name, source, tuple(linear.matrix for linear in linears))
        for index, linear in enumerate(linears):
            if linear.bias is not None:
                bias = self._builder.constant(f"{name}.{index}.bias", linear.bias)
                results[index] = self._builder.node("Add", [results[index], bias], f"{name}.{index}.biased")
        return results

    def linear(self, name: str, source: str, linear: Linear) -> str:
        return self.linears(name, source, (linear,))[0]

    def matmuls(self, name: str, source: str, matrices: tuple[Matrix, ...]) -> list[str]:
        """`source` times each matrix, transposed. What several of them need of it is computed once."""
        shared = _Source(self._builder, name, source)
        return [self._matmul(f"{name}.{index}", shared, matrix) for index, matrix in enumerate(matrices)]

    def _matmul(self, name: str, source: "_Source", matrix: Matrix) -> str:
        if not isinstance(matrix, PackedBlocks):
            weight = self._builder.constant(f"{name}.weight", matrix)
            return self._builder.node("Gemm", [source.name, weight], name, transB=1)
        kept = self._file.add(matrix) if self._file else None
        if kept is not None:
            codes = self._builder.kept(f"{name}.codes", matrix.codes.shape, kept)
            scales = self._builder.constant(f"{name}.scales", kept.scales.reshape(-1))
            return self._builder.matmul_blocks([source.name, codes, scales], name, matrix, INT8_ACCUMULATION)
        folded = fold(matrix) if self._accuracy_level == INT8_ACCUMULATION else None
        if folded is None:
            return self._matmul_blocks(name, source, matrix)
        zeros = self._builder.constant(f"{name}.zeros", folded.zeros)
        whole = msgspec.structs.replace(matrix, codes=folded.codes, scales=folded.scales, offsets=None)
        return self._matmul_codes(name, source.with_sums(matrix), whole, zeros)

    def _matmul_blocks(self, name: str, source: "_Source", matrix: PackedBlocks) -> str:
        """Codes times scales, and where blocks have an offset, the sums of the blocks' activations times offsets.

        With (code - zero) * scale + offset for a weight, both together are exact; the operator alone takes offsets
        only in a form that is a hundred times slower.
        """
        scaled_name = name if matrix.offsets is None else f"{name}.scaled"
        if matrix.bits == BYTE_BITS and self._accuracy_level == FLOAT_ACCUMULATION:
            scaled = self._matmul_halves(scaled_name, source.name, matrix)
        else:
            scaled = self._matmul_codes(scaled_name, source.name, matrix)
        if matrix.offsets is None:
            return scaled
        offsets = self._builder.constant(f"{name}.offsets", matrix.offsets)
        return self._builder.node("Gemm", [source.sums(matrix), offsets, scaled], name, transB=1)

    def _matmul_halves(self, name: str, source: str, matrix: PackedBlocks) -> str:
        """A code of 8 bits as two of 4: code - 128 is 16 * (high - 8) + low.

        The operator has a kernel for 4 bits and floats alone. With 8 it unpacks the whole matrix for every token, which
        takes 20 times as long.
        """
        high_codes, low_codes = halves(matrix.codes)
        high = msgspec.structs.replace(matrix, codes=high_codes, scales=16 * matrix.scales, bits=BYTE_BITS // 2)
        low = msgspec.structs.replace(matrix, codes=low_codes, bits=BYTE_BITS // 2)
        rows, blocks = matrix.scales.shape
        zeros = self._builder.constant(f"{name}.low.zeros", np.zeros((rows, -(-blocks // 2)), np.uint8))
        products = [
            self._matmul_codes(f"{name}.high", source, high),
            self._matmul_codes(f"{name}.low", source, low, zeros),
        ]
        return self._builder.node("Add", products, name)

    def _matmul_codes(self, name: str, source: str, matrix: PackedBlocks, *zeros: str) -> str:
        builder = self._builder
        codes = builder.constant(f"{name}.codes", matrix.codes)
        scales = builder.constant(f"{name}.scales", matrix.scales.reshape(-1))
        return builder.matmul_blocks([source, codes, scales, *zeros], name, matrix, self._accuracy_level)


class _Source:
    """Activations, and what products with blocks need of them. Matrices of one source may have blocks of different
    sizes.
    """

    def __init__(self, builder: GraphBuilder, products: str, name: str) -> None:
        self.name = name
        self._builder = builder
        self._products = products
        self._sums: dict[int, str] = {}
        self._with_sums: dict[int, str] = {}

    def sums(self, matrix: PackedBlocks) -> str:
        """[tokens, blocks]: the sum of each block of activations."""
        builder, size, name = self._builder, matrix.block_size, f"{self._products}.blocked.{matrix.block_size}"
        if size not in self._sums:
            shape = builder.constant(f"{name}.shape", np.array([-1, matrix.scales.shape[1], size], np.int64))
            axis = builder.constant(f"{name}.axis", np.array([2], np.int64))
            blocked = builder.node("Reshape", [self.name, shape], name)
            self._sums[size] = builder.node("ReduceSum", [blocked, axis], f"{name}.sums", keepdims=0)
        return self._sums[size]

    def with_sums(self, matrix: PackedBlocks) -> str:
        """What `Folded` wants."""
        builder, size, name = self._builder, matrix.block_size, f"{self._products}.folded.{matrix.block_size}"
        if size not in self._with_sums:
            sums, count = self.sums(matrix), filling(matrix)
            if count:
                pads = builder.constant(f"{name}.filling", np.array([0, 0, 0, count], np.int64))
                sums = builder.node("Pad", [sums, pads], f"{name}.sums")
            self._with_sums[size] = builder.node("Concat", [self.name, *[sums] * DIGITS], name, axis=-1)
        return self._with_sums[size]


def halves(codes: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The high and the low 4 bits of codes of 8, each two to a byte, the first in its low bits."""
    first, second = codes[..., 0::2], codes[..., 1::2]
    low, four = np.uint8(0x0F), np.uint8(4)
    return (first >> four) | (second & ~low), (first & low) | (second << four)
