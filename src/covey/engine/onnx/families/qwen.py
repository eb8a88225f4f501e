"""Qwen 2 and 2.5, which have biases on query, key and value, and Qwen 3, which has norms there instead.

Biases need nothing said: every family's are added where the file has them.
"""

from covey.engine.onnx.architecture import Architecture
from covey.engine.onnx.families.llama import experts, plain
from covey.engine.onnx.stated import Stated


def qwen2(stated: Stated) -> Architecture:
    return plain(stated)


def qwen3(stated: Stated) -> Architecture:
    return plain(stated, head_norms="heads")


def qwen3moe(stated: Stated) -> Architecture:
    return plain(stated, head_norms="heads", experts=experts(stated))
