"""Clients that find the active node without a virtual address, as docs/clients.md says."""

from __future__ import annotations

from phalanx.testing.vips import PORT, VipStage


def test_name_with_the_addresses_of_all_nodes() -> None:
    """DNS: a client that tries each address of a name reaches the active node, whichever it is."""
    with VipStage(3) as stage:
        addresses = ",".join(stage.host(node).address for node in stage.names)
        known = f"wiki.example.org:{PORT}:{addresses}"

        def answers() -> str:
            url = f"http://wiki.example.org:{PORT}/"
            command = ["curl", "-sS", "--max-time", "2", "--connect-timeout", "1", "--resolve", known, url]
            done = stage.client.run(command, check=False)
            return done.stdout.split(" ")[0] if done.returncode == 0 else ""

        active = stage.settled()
        assert answers() == active
        stage.nodes[active].kill()
        following = stage.wait_until(lambda: (found := answers()) != active and found, "nobody answers")
        assert stage.wait_for_active(other_than=active) == following
