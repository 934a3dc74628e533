"""Which backend runs, and what is said when it cannot."""

import warnings

import pytest
import torch

from fastpref import gae, kernels


@pytest.fixture
def without_extensions(monkeypatch):
    """As on a machine where fastpref was installed without a compiler."""
    real = kernels.importlib.import_module

    def import_module(name):
        if name in ("fastpref._cpu", "fastpref._cuda"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name)

    def forget():
        for cached in (kernels.choose, kernels.why_not, kernels._say_fallback):
            cached.cache_clear()

    forget()
    monkeypatch.setattr(kernels.importlib, "import_module", import_module)
    yield
    forget()


def test_fallback_is_said_aloud_once(without_extensions):
    rewards = torch.ones(2, 3)
    with pytest.warns(UserWarning, match="torch fallback runs in place of cpu .not built: .* a C[+][+] compiler"):
        advantages, _ = gae(rewards, torch.zeros(2, 3), gamma=1.0, lam=1.0)
    torch.testing.assert_close(advantages, torch.tensor([3.0, 2.0, 1.0]).expand(2, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gae(rewards, rewards)


def test_status_says_why_not(without_extensions):
    status = kernels.status()
    assert set(status) == set(kernels.BACKENDS)
    assert status["reference"].startswith("ready") and status["torch"].startswith("ready")
    assert "without a C++ compiler" in status["cpu"] and "without nvcc" in status["cuda"]


def test_named_backend_that_is_not_usable_raises(without_extensions):
    with pytest.raises(RuntimeError, match=r"^gae: backend 'cpu' is not usable here: not built"):
        kernels.choose("gae", "cpu", "cpu")


def test_extension_that_does_not_load_is_reported(without_extensions, monkeypatch):
    def import_module(name):
        raise ImportError("libgomp.so.1: cannot open shared object file")

    monkeypatch.setattr(kernels.importlib, "import_module", import_module)
    assert kernels.why_not("cpu") == "built, but does not load: libgomp.so.1: cannot open shared object file"


def test_refuses_a_backend_that_is_unknown_or_on_another_device():
    with pytest.raises(ValueError, match=r"^gae: backend must be None or one of \['reference', .*\]; got 'tpu'$"):
        kernels.choose("gae", "cpu", "tpu")
    with pytest.raises(ValueError, match=r"^gae: backend 'cpu' wants tensors on cpu; got cuda$"):
        kernels.choose("gae", "cuda", "cpu")


@pytest.mark.filterwarnings("ignore:fastpref. the slower torch fallback")
def test_reference_is_never_chosen_automatically():
    for device_type in ("cpu", "cuda", "mps", "meta"):
        assert "reference" not in kernels.choose("gae", device_type).__name__


def test_fallback_where_a_device_has_no_kernel_is_said_aloud():
    kernels.choose.cache_clear()
    kernels._say_fallback.cache_clear()
    with pytest.warns(UserWarning, match="in place of a mps kernel .head has none yet"):
        assert kernels.choose("head", "mps").__name__ == "fastpref.kernels.torch.head"
