"""Which network interface ranks listen on, where a host's name means only the host itself."""

from __future__ import annotations

import os
import socket

import psutil
import pytest

from sparselt_dist import distributed


def test_no_interface_leads_to_oneself_by_the_loopback() -> None:
    assert distributed.interface_towards("127.0.0.1", 29500) is None


def test_the_interface_is_the_one_with_the_address_that_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    name, own = next(
        ((name, entry.address) for name, given in psutil.net_if_addrs().items() for entry in given
         if entry.family == socket.AF_INET and not entry.address.startswith("127.")),
        (None, None),
    )  # fmt: skip
    if name is None or own is None:
        pytest.skip("this machine has no address but its loopback's")
    assert distributed.interface_towards(own, 29500) == name
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv("MASTER_ADDR", own)
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")
    distributed._choose_interface()
    assert os.environ.pop("GLOO_SOCKET_IFNAME") == name
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "chosen")
    distributed._choose_interface()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "chosen"
