"""Targets as machines: against the tables that Google publishes; meshes against the number of devices."""

import pytest

from llmjax.config import ConfigError, InputError
from llmjax.launch.machines import FAMILIES, accelerator, check_mesh, machines
from llmjax.launch.place import check_name
from llmjax.parallel.mesh import MeshConfig

# Cloud TPU's pages on v4, v5e, v5p and v6e (accelerator type, chips, hosts of a shape) and GKE's machine types.
PUBLISHED = {
    "v4:2x2x1": ("v4-8", 4, 1, "ct4p-hightpu-4t"),
    "v4:4x4x4": ("v4-128", 64, 16, "ct4p-hightpu-4t"),
    "v5e:1x1": ("v5litepod-1", 1, 1, "ct5lp-hightpu-1t"),
    "v5e:2x4": ("v5litepod-8", 8, 1, "ct5lp-hightpu-8t"),
    "v5e:4x4": ("v5litepod-16", 16, 4, "ct5lp-hightpu-4t"),
    "v5e:16x16": ("v5litepod-256", 256, 64, "ct5lp-hightpu-4t"),
    "v5p:2x2x1": ("v5p-8", 4, 1, "ct5p-hightpu-4t"),
    "v5p:2x2x2": ("v5p-16", 8, 2, "ct5p-hightpu-4t"),
    "v5p:2x4x4": ("v5p-64", 32, 8, "ct5p-hightpu-4t"),
    "v5p:4x4x4": ("v5p-128", 64, 16, "ct5p-hightpu-4t"),
    "v5p:4x8x8": ("v5p-512", 256, 64, "ct5p-hightpu-4t"),
    "v5p:8x8x8": ("v5p-1024", 512, 128, "ct5p-hightpu-4t"),
    "v5p:8x16x16": ("v5p-4096", 2048, 512, "ct5p-hightpu-4t"),
    "v5p:16x16x24": ("v5p-12288", 6144, 1536, "ct5p-hightpu-4t"),
    "v6e:2x2": ("v6e-4", 4, 1, "ct6e-standard-4t"),
    "v6e:2x4": ("v6e-8", 8, 1, "ct6e-standard-8t"),
    "v6e:4x4": ("v6e-16", 16, 4, "ct6e-standard-4t"),
    "v6e:16x16": ("v6e-256", 256, 64, "ct6e-standard-4t"),
}


@pytest.mark.parametrize("text", PUBLISHED)
def test_slices_are_as_published(text):
    kind, chips, hosts, machine = PUBLISHED[text]
    found = machines(text)
    family = FAMILIES[text.partition(":")[0]]
    assert accelerator(found, family) == [f"--accelerator-type={kind}"]
    assert (found.target.chips, found.devices, found.hosts) == (chips, chips, hosts)
    assert f"{family.machine}-{found.chips_per_host}t" == machine


@pytest.mark.parametrize(("text", "cores"), [("v5p:4x4x16", 512), ("v5p:4x8x12", 768), ("v5p:4x4x20", 640)])
def test_other_shapes_are_ordered_by_their_topology(text, cores):
    """v5p-512 stands for 4x8x8; a topology that has no accelerator type of its own is named."""
    name, _, topology = text.partition(":")
    found = machines(text)
    assert found.target.chips == cores // 2
    assert accelerator(found, FAMILIES[name]) == ["--type=v5p", f"--topology={topology}"]


def test_ironwood_shows_two_devices_a_chip():
    found = machines("tpu7x:4x4x4")
    assert (found.target.chips, found.devices, found.hosts) == (64, 128, 16)


def test_gpus_are_hosts_of_several():
    found = machines("h200:4x1x8")
    assert (found.devices, found.hosts, found.chips_per_host) == (32, 4, 8)


WRONG = {
    "v5p": "is not of the form chip:AxBxC",
    "v5p:4x4xtwo": "is not of the form chip:AxBxC",
    "v5pp:4x4x4": "did you mean v5p",
    "v5p:4x4x5": "v5p:4x4x4",
    "v5p:8x4x4": "v5p:4x4x8",
    "v6e:4x16": "v6e:",
    "v6e:32x32": "v6e:16x16",
    "v4:16x16x24": "v4:16x16x16",
    "h200:8": "h200:1x1x8",
    "cpu:8": "use cpu:1",
}


@pytest.mark.parametrize("text", WRONG)
def test_unknown_targets_name_the_nearest(text):
    with pytest.raises(InputError, match=rf"target='{text}'.*{WRONG[text]}"):
        machines(text)


@pytest.mark.parametrize(
    ("mesh", "devices", "use"),
    [
        (MeshConfig(), 8, "mesh.data=1 makes a mesh of 1 devices (no axis is split), but pod has 8: use mesh.data=8"),
        (
            MeshConfig(data=2, fsdp=32),
            512,
            "mesh.data=2 makes a mesh of 64 devices (data=2 x fsdp=32), but pod has 512: use mesh.data=16",
        ),
        (
            MeshConfig(fsdp=64),
            32,
            "mesh.fsdp=64 makes a mesh of 64 devices (fsdp=64), but pod has 32: use mesh.fsdp=32",
        ),
        (
            MeshConfig(data=0, tensor=3),
            8,
            "mesh.tensor=3 makes a mesh of 3 devices (tensor=3), but pod has 8: use mesh.tensor=8",
        ),
        (
            MeshConfig(fsdp=3, tensor=3),
            8,
            "mesh.fsdp=3 makes a mesh of 9 devices (fsdp=3 x tensor=3), but pod has 8: use axes whose product is 8",
        ),
    ],
)
def test_meshes_of_another_size_say_which_axis_would_be_right(mesh, devices, use):
    with pytest.raises(ConfigError) as caught:
        check_mesh(mesh, devices, "pod")
    assert str(caught.value) == use


@pytest.mark.parametrize(("mesh", "devices"), [(MeshConfig(data=2, fsdp=4), 8), (MeshConfig(data=0, fsdp=4), 8)])
def test_meshes_of_the_right_size_pass(mesh, devices):
    check_mesh(mesh, devices, "pod")


@pytest.mark.parametrize("name", ["a", "llama3-8b", "a" * 40])
def test_names_that_machines_can_have(name):
    check_name(name)


@pytest.mark.parametrize(
    ("name", "better"),
    [
        ("", "run-1"),
        ("8b", "b"),
        ("Llama_3", "llama-3"),
        ("a-", "a"),
        ("a b;rm", "a-b-rm"),
        ("x$(id)", "x-id"),
        ("a\nb", "a-b"),
        ("b" * 41, "b" * 40),
    ],
)
def test_names_that_they_cannot(name, better):
    with pytest.raises(InputError, match=rf"RFC 1035\): use for example {better}$"):
        check_name(name)
