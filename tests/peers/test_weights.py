"""Weights of a network written by hand in PyTorch, there and back."""

import jax.numpy as jnp
import numpy as np
import pytest

import jmlp
from jmlp.export.run import export_run

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.torch")
pytestmark = pytest.mark.usefixtures("no_pictures")


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = torch.nn.Linear(64, 24), torch.nn.Linear(24, 16)
        self.out = torch.nn.Linear(16, 10)

    def forward(self, x):
        return self.out(torch.relu(self.fc2(torch.relu(self.fc1(x)))))


def test_there_and_back(tmp_path):
    torch.manual_seed(0)
    net = Net()
    safetensors.save_file(net.state_dict(), tmp_path / "net.safetensors")
    train = {"epochs": 1, "init_from": str(tmp_path / "net.safetensors"), "freeze": ["."]}
    settings = {"data": {"name": "digits"}, "model": {"hidden": [24, 16]}, "train": train}
    run = jmlp.train(settings)
    programs, rows = run.setup.programs, run.setup.dataset.train.x[:100]
    x = np.asarray(programs.placement.scale(jnp.asarray(rows)))
    with torch.no_grad():
        want = net(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(programs.outputs(run.state, rows), want, atol=1e-5)

    export_run(run, "safetensors", tmp_path / "back.safetensors")
    back = safetensors.load_file(tmp_path / "back.safetensors")
    names = {"fc1": "blocks.0.linear", "fc2": "blocks.1.linear", "out": "head"}
    given = {f"{own}.{part}": back[f"{names[own]}.{part}"] for own in names for part in
             ("weight", "bias")}  # fmt: skip
    for name, value in net.state_dict().items():
        assert torch.equal(given[name], value), name
