"""Phi 3 and 4: query, key and value are one tensor, gate and up another; long contexts have divisors of their own."""

from covey.engine.onnx.architecture import Architecture
from covey.engine.onnx.families.llama import plain
from covey.engine.onnx.stated import Stated


def phi3(stated: Stated) -> Architecture:
    return plain(stated, is_joined=True)
