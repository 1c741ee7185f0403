"""The order in which `fsdp` launches gathers ahead of their use."""

from types import SimpleNamespace

from dist_qft.sharding.fsdp import order_backward_gathers, order_forward_gathers


class Unit:
    """A unit that keeps the units it was told to gather before it computes."""

    def set_modules_to_forward_prefetch(self, units):
        self.forward = units

    def set_modules_to_backward_prefetch(self, units):
        self.backward = units


def test_each_layer_gathers_the_next_one():
    first, second, third, root = layers = [Unit() for _ in range(4)]
    units = SimpleNamespace(layers=layers[:3], root=root)
    order_forward_gathers(units)
    assert first.forward == [second] and second.forward == [third] and not hasattr(third, "forward")
    order_backward_gathers(units)
    assert root.backward == [third] and third.backward == [second] and second.backward == [first]
    assert first.backward == [first], "else FSDP2 would gather the embedding"
