"""Device, network and ports follow from what the launcher said."""

import os
import socket
from types import SimpleNamespace

import pytest
import torch

from parallel import launch
from parallel.launch import DistributedError, Place, device_of, interface_of, name_of, route_to, use_interface


@pytest.fixture
def gpus(monkeypatch):
    """Pretend that so many are visible."""

    def pretend(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return pretend


def test_each_process_of_a_machine_has_a_gpu_of_its_own(gpus):
    gpus(4)
    assert [device_of(Place(local_rank=rank, local_size=4)).index for rank in range(4)] == [0, 1, 2, 3]


def test_fewer_gpus_than_processes_are_refused(gpus, monkeypatch):
    gpus(2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,3")
    with pytest.raises(DistributedError, match=r"4 processes on .*, but 2 GPUs \(CUDA_VISIBLE_DEVICES=0,3\): start 2"):
        device_of(Place(rank=2, size=4, local_rank=2, local_size=4, launcher="torchrun"))


def test_a_task_that_sees_its_own_gpus_only_takes_its_first(gpus):
    gpus(1)
    tasks = [Place(rank=rank, size=4, local_rank=rank, local_size=4, launcher="srun") for rank in range(4)]
    assert [device_of(task).index for task in tasks] == [0] * 4


def test_without_gpus_the_cpu_computes(gpus):
    gpus(0)
    assert device_of(Place()).type == "cpu" and name_of(torch.device("cpu")) == ""


def test_slices_of_one_gpu_are_told_apart(monkeypatch):
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="GPU-1", name="A100 MIG 1g.5gb")
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-2")
    assert name_of(torch.device("cuda", 0)) == "GPU-1 MIG-2"


def test_the_interface_on_the_way_to_rank_0_is_found():
    names = [name for _, name in socket.if_nameindex()]
    own = route_to("127.0.1.1")
    assert launch.is_loopback(own) and interface_of(own) in names
    assert interface_of("192.0.2.1") == "", "an address of nobody's (RFC 5737)"
    assert route_to("no.such.host.invalid") == ""


def test_an_interface_that_the_environment_chose_is_kept(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    assert use_interface("eth0") == ["nccl"]
    assert os.environ["GLOO_SOCKET_IFNAME"] == "ib0" and os.environ["NCCL_SOCKET_IFNAME"] == "=eth0"
    monkeypatch.delenv("NCCL_SOCKET_IFNAME")
    assert use_interface("") == [] and "NCCL_SOCKET_IFNAME" not in os.environ


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n1", "n1"), ("n1,n2", "n1"), ("gpu[01-02,5],n1", "gpu01"), ("a[1-2]b", "a1b"), ("r[07,9]n[003-4]", "r07n003")],
)
def test_the_first_node_of_a_step_is_read_without_slurms_programs(nodes, first):
    assert launch._first_host(nodes) == first


def test_a_job_has_further_ports_and_a_port_that_was_given_has_none():
    ports = Place(port=29990, derived=True).ports
    assert ports[0] == 29990 and len(set(ports)) == len(ports) > 4
    assert all(launch.FIRST_PORT <= port < launch.FIRST_PORT + launch.PORTS for port in ports)
    assert Place(port=29990).ports == [29990]
