"""What a node knows of its network, in its state."""

from covey.control.machine import Machine
from covey.control.settings import MachineSettings
from covey.schema.ids import NodeId
from covey.schema.machine import NetworkNoticed, Started, StateChanged


def test_a_sentence_is_in_the_state_until_it_is_taken_back_and_is_told_once() -> None:
    machine = Machine(NodeId("a" * 32), 1, "ada", "1", MachineSettings())
    machine.handle(0, Started())
    machine.handle(1, NetworkNoticed(()))
    told = machine.handle(2, NetworkNoticed(("another cluster is here",)))
    assert StateChanged() in told
    assert machine.state(2).notices == ("another cluster is here",)
    assert StateChanged() not in machine.handle(3, NetworkNoticed(("another cluster is here",)))
    assert StateChanged() in machine.handle(4, NetworkNoticed(()))
    assert machine.state(4).notices == ()
