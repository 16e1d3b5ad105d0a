"""Loading into a model: into its own memory where nothing but torch looks on, and as a whole or not at all."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import pyprune
from pyprune.sparse.reading import SparseFile


def net() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(33, 65), nn.Linear(65, 5))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter[torch.rand_like(parameter) < 0.6] = 0
    return model


def saved(tmp_path, **options):
    model = net()
    path = tmp_path / "model.safetensors"
    pyprune.save_sparse(model, path, **options)
    return path, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def other() -> nn.Sequential:
    model = net()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(3)
    return model


def with_masks() -> nn.Module:
    model = other()
    pyprune.prune(model, "UNSTRUCTURED_MAGNITUDE_LOCAL", ratio=0.5)
    return model


def transposed() -> nn.Module:
    model = other()
    model[3].weight = nn.Parameter(torch.full((33, 65), 3.0).t())
    return model


def in_one_memory() -> nn.Module:
    model = other()
    memory = torch.full((33 * 65 + 65 * 5,), 3.0)
    model[3].weight = nn.Parameter(memory[: 33 * 65].view(65, 33))
    model[4].weight = nn.Parameter(memory[33 * 65 :].view(5, 65))
    return model


def of_negations() -> nn.Module:
    model = other()
    model[1].running_mean = torch._neg_view(torch.full((8,), -3.0))
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": other,
    "of another dtype": lambda: other().double(),
    "with masks": with_masks,
    "not contiguous": transposed,
    "in one memory": in_one_memory,
    "whose signs are flipped when it is read": of_negations,
    "without gradients": lambda: other().requires_grad_(False),
    "wrapped": lambda: nn.DataParallel(other()),
}


@pytest.mark.parametrize("codec", [None, "zstd"])
@pytest.mark.parametrize("name", MODELS)
def test_load_sparse_into_a_model_is_load_state_dict(tmp_path, name, codec):
    path, wanted = saved(tmp_path, codec=codec)
    models = [MODELS[name](), MODELS[name]()]
    places = [tensor.data_ptr() for tensor in models[0].state_dict().values()]
    assert pyprune.load_sparse(path, models[0]) is models[0]
    prefix = "module." if name == "wrapped" else ""
    models[1].load_state_dict({prefix + key: tensor for key, tensor in wanted.items()})
    assert [tensor.data_ptr() for tensor in models[0].state_dict().values()] == places
    for found, expected in zip(models[0].state_dict().values(), models[1].state_dict().values(), strict=True):
        assert torch.equal(found, expected)
    if name == "with masks":
        for model in models:
            pyprune.strip(model)
        assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))


def test_load_sparse_takes_no_memory_for_what_it_writes_in_place(tmp_path, monkeypatch):
    path, _ = saved(tmp_path)
    monkeypatch.setattr(SparseFile, "read", lambda self, name: pytest.fail(f"{name} was read into new memory"))
    pyprune.load_sparse(path, other())


def test_load_sparse_is_noticed_by_autograd(tmp_path):
    path, _ = saved(tmp_path)
    model = other()
    loss = model[3](torch.ones(2, 33, requires_grad=True)).sum()
    pyprune.load_sparse(path, model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def damage_last_byte(path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def refuse(*args: object) -> None:
    raise RuntimeError("not this one")


class Refusing(nn.Linear):
    def _load_from_state_dict(self, *args: object) -> None:
        refuse()


def refusing() -> nn.Module:
    model = other()
    model[4].__class__ = Refusing
    return model


def with_hook() -> nn.Module:
    model = other()
    model.register_load_state_dict_pre_hook(refuse)
    return model


def with_hook_after() -> nn.Module:
    model = other()
    model.register_load_state_dict_post_hook(refuse)
    return model


def with_method_of_its_own() -> nn.Module:
    model = other()
    model[4]._load_from_state_dict = refuse
    return model


def with_buffer(buffer: Tensor) -> nn.Module:
    model = other()
    model[1].running_var = buffer
    return model


class InShards(Tensor):
    """A tensor that takes values of its own class alone, as DTensor does."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is Tensor.copy_ and not isinstance(args[1], InShards):
            refuse()
        return super().__torch_function__(function, types, args, kwargs or {})


@torch.inference_mode()
def made_for_inference() -> nn.Module:
    return other()


def nothing(path) -> None:
    pass


@pytest.mark.parametrize(
    ("make", "damage", "error"),
    [
        (other, damage_last_byte, ValueError),
        (with_masks, damage_last_byte, ValueError),
        (with_hook, nothing, RuntimeError),
        (with_hook_after, nothing, RuntimeError),
        (with_method_of_its_own, nothing, RuntimeError),
        (refusing, nothing, RuntimeError),
        (lambda: with_buffer(torch.full((1,), 3.0).expand(8)), nothing, ValueError),
        (lambda: with_buffer(torch.full((8,), 3.0).as_subclass(InShards)), nothing, RuntimeError),
        (made_for_inference, nothing, ValueError),
    ],
)
def test_load_sparse_that_fails_leaves_the_model_as_it_was(tmp_path, make, damage, error):
    path, _ = saved(tmp_path)
    damage(path)
    model = make()
    before: dict[str, Tensor] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(error):
        pyprune.load_sparse(path, model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: with_buffer(torch.full((1,), 3.0).expand(8)), "1.running_var of the model has elements that share"),
        (lambda: with_buffer(torch.full((8,), 3.0).to_sparse()), "1.running_var of the model is torch.sparse_coo"),
        (lambda: with_buffer(torch.ones(8, device="meta")), "1.running_var of the model is on the meta device"),
        (lambda: other().to("meta"), "0.weight of the model is on the meta device"),
        (made_for_inference, "0.weight of the model was made in torch.inference_mode"),
        (lambda: nn.Sequential(nn.LazyLinear(2)), "0.weight of the model has no shape yet"),
    ],
)
def test_load_sparse_names_what_cannot_be_written(tmp_path, make, message):
    path, _ = saved(tmp_path)
    with pytest.raises(ValueError, match=message):
        pyprune.load_sparse(path, make())


def test_load_sparse_in_inference_mode_writes_what_was_made_there(tmp_path):
    path, wanted = saved(tmp_path)
    with torch.inference_mode():
        model = pyprune.load_sparse(path, other())
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())


def test_load_sparse_asks_code_of_a_model_about_its_extra_state(tmp_path):
    class Counting(nn.Linear):
        def get_extra_state(self) -> Tensor:
            return torch.ones(1)

        def set_extra_state(self, state: Tensor) -> None:
            refuse()

    path = tmp_path / "model.safetensors"
    pyprune.save_sparse(Counting(64, 64), path)
    model = Counting(64, 64)
    before = model.weight.detach().clone()
    with pytest.raises(RuntimeError, match="not this one"):
        pyprune.load_sparse(path, model)
    assert torch.equal(model.weight, before)
