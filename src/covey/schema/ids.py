"""The identifiers that the rooms pass to one another.

Each is a string with a name of its own, so that the type checker tells a runner from an instance. Identifiers are
made in `control` (from node, boot and a counter) or in `effects` (a node's id is the hash of its key), never here.
"""

from typing import NewType

NodeId = NewType("NodeId", str)  # 32 hex characters: the hash of the node's public key
InstanceId = NewType("InstanceId", str)
RunnerId = NewType("RunnerId", str)
ModelId = NewType("ModelId", str)  # as a person names it, for example "SmolLM2-135M-Instruct"
RequestId = NewType("RequestId", str)
