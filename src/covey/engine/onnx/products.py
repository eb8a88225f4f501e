"""Products of activations and the weights of a checkpoint, in the forms that the operators compute fast.

`PackedBlocks` go to `MatMulNBits`, plain floats to `Gemm`.
"""

from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from covey.checkpoints.quantization import PackedBlocks
from covey.engine.onnx.builder import MICROSOFT, GraphBuilder
from covey.engine.onnx.weights import Linear, Matrix

INT8_ACCUMULATION: Final = 4  # `accuracy_level`: activations are quantised to 8 bits per block, as llama.cpp does
FLOAT_ACCUMULATION: Final = 0  # they stay as they are: slower, and the same whether a token is computed alone or not
BYTE_BITS: Final = 8


class Products:
    """Adds products to a builder."""

    def __init__(self, builder: GraphBuilder, *, is_exact: bool) -> None:
        self._builder = builder
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
        """`source` times each matrix, transposed. The block sums of `source` are computed once for all of them."""
        sums: dict[int, str] = {}
        results: list[str] = []
        for index, matrix in enumerate(matrices):
            own_name = f"{name}.{index}"
            if not isinstance(matrix, PackedBlocks):
                weight = self._builder.constant(f"{own_name}.weight", matrix)
                results.append(self._builder.node("Gemm", [source, weight], own_name, transB=1))
                continue
            if matrix.offsets is not None and matrix.block_size not in sums:
                sums[matrix.block_size] = self._block_sums(name, source, matrix)
            results.append(self._matmul_blocks(own_name, source, matrix, sums.get(matrix.block_size, "")))
        return results

    def _block_sums(self, name: str, source: str, matrix: PackedBlocks) -> str:
        builder, size = self._builder, matrix.block_size
        name = f"{name}.blocked.{size}"  # matrices of one source may have blocks of different sizes
        shape = builder.constant(f"{name}.shape", np.array([-1, matrix.scales.shape[1], size], np.int64))
        axis = builder.constant(f"{name}.axis", np.array([2], np.int64))
        blocked = builder.node("Reshape", [source, shape], name)
        return builder.node("ReduceSum", [blocked, axis], f"{name}.sums", keepdims=0)

    def _matmul_blocks(self, name: str, source: str, matrix: PackedBlocks, sums: str) -> str:
        """Codes times scales, and where blocks have an offset, the sums of the blocks' activations times offsets.

        With (code - zero) * scale + offset for a weight, both together are exact; the operator alone takes offsets
        only in a form that is a hundred times slower.
        """
        scaled_name = name if matrix.offsets is None else f"{name}.scaled"
        if matrix.bits == BYTE_BITS and self._accuracy_level == FLOAT_ACCUMULATION:
            scaled = self._matmul_halves(scaled_name, source, matrix)
        else:
            scaled = self._matmul_codes(scaled_name, source, matrix)
        if matrix.offsets is None:
            return scaled
        offsets = self._builder.constant(f"{name}.offsets", matrix.offsets)
        return self._builder.node("Gemm", [sums, offsets, scaled], name, transB=1)

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
        """Without `zeros`, a zero is half of what the codes' bits hold."""
        builder = self._builder
        rows, blocks = matrix.scales.shape
        codes = builder.constant(f"{name}.codes", matrix.codes)
        scales = builder.constant(f"{name}.scales", matrix.scales.reshape(-1))
        return builder.node(
            "MatMulNBits", [source, codes, scales, *zeros], name, MICROSOFT,
            N=rows, K=blocks * matrix.block_size, bits=matrix.bits, block_size=matrix.block_size,
            accuracy_level=self._accuracy_level,
        )  # fmt: skip


def halves(codes: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The high and the low 4 bits of codes of 8, each two to a byte, the first in its low bits."""
    first, second = codes[..., 0::2], codes[..., 1::2]
    low, four = np.uint8(0x0F), np.uint8(4)
    return (first >> four) | (second & ~low), (first & low) | (second << four)
