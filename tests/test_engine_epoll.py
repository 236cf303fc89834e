"""The engine contract on epoll, and what only epoll can get wrong."""
import errno
import os
import select
import socket
import struct

import pytest

pytest.register_assert_rewrite("engine_contract")

import leviathan                                # noqa: E402
from engine_contract import RESET, EngineContract   # noqa: E402
from fake_engine import Plan, faulty            # noqa: E402

if not hasattr(select, "epoll"):
    pytest.skip("needs select.epoll, which only Linux has", allow_module_level=True)

import leviathan_linux                          # noqa: E402

TURNS = 10          # what nothing to do may cost in a tenth of a second; a loop that spins makes thousands


class Counted(bytes):
    """Bytes that count how often their length is asked."""

    asked = 0

    def __len__(self):
        Counted.asked += 1
        return super().__len__()


class TestEpoll(EngineContract):
    module = leviathan_linux
    settings = {"USE_EPOLL": True}       # even under LEVIATHAN_POLL=1

    def turns(self, queue):
        """How many turns the loops make while nothing is to be done."""
        self.elapse(queue, 0.02)
        before = queue.statistics()["turns"]
        self.elapse(queue, 0.1)
        return queue.statistics()["turns"] - before

    def test_it_is_epoll_that_is_tested(self):
        assert isinstance(self.queue().engine.workers[0].poller, select.epoll)

    # -- what cannot be masked ----------------------------------------------------------------------------------------

    @pytest.mark.parametrize("ending", ["half", "close", "reset"])
    def test_a_paused_session_whose_peer_ends_does_not_spin(self, ending):
        _, session, client = self.pair(lambda session, packet: session.pause())
        client.sendall(self.packed(b"stop", b"rest"))
        self.record.wait_for("packet")
        if ending == "half":
            client.shutdown(socket.SHUT_WR)
        else:
            if ending == "reset":
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            client.close()
        assert self.turns(session.communicator.queue) < TURNS
        assert self.record.count("on_closed") == 0
        session.resume()
        self.record.wait_for("packet", 2)
        session.resume()
        self.record.wait_for("on_closed")

    def test_a_half_closed_session_that_stays_open_does_not_spin(self):
        _, session, client = self.pair(on_eof=lambda session: None)
        client.shutdown(socket.SHUT_WR)
        self.record.wait_for("on_eof")
        assert self.turns(session.communicator.queue) < TURNS
        assert self.record.count("on_eof") == 1
        session.send(b"still")
        assert self.read(client, 9) == self.packed(b"still")
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        client.close()
        assert self.turns(session.communicator.queue) < TURNS
        session.close()
        self.record.wait_for("on_closed")

    def test_a_session_half_closed_on_both_sides_does_not_spin(self):
        _, session, client = self.pair()
        session.finish()
        assert self.read_to_end(client) == b""
        assert self.turns(session.communicator.queue) < TURNS
        client.shutdown(socket.SHUT_WR)
        self.record.wait_for("on_closed")

    def test_a_congested_session_does_not_spin(self):
        _, session, client = self.pair()
        session.send(b"x" * 8000000)
        self.on_thread(session, int)
        client.sendall(self.packed(b"unread"))
        assert self.turns(session.communicator.queue) < TURNS
        client.shutdown(socket.SHUT_WR)
        assert self.turns(session.communicator.queue) < TURNS
        session.close()
        assert self.turns(session.communicator.queue) < TURNS
        client.close()
        self.record.wait_for("on_closed")

    def test_a_full_communicator_does_not_spin(self):
        communicator, listener = self.serve(max_clients=1)
        self.client(listener), self.client(listener)
        self.record.wait_for("connect")
        assert self.turns(communicator.queue) < TURNS

    def test_idle_threads_do_not_spin(self):
        queue = self.queue(3)
        self.serve(queue=queue)
        assert self.turns(queue) < 3 * TURNS

    def test_nothing_is_read_between_a_pause_and_what_it_has_kept(self):
        # What has been received is handled first. An end that were read before would throw it away.
        _, session, client = self.pair(lambda session, packet: session.pause() if packet == b"stop" else None)
        client.sendall(self.packed(b"stop", b"kept"))
        self.record.wait_for("packet")
        client.shutdown(socket.SHUT_WR)

        def resume_while_a_poll_comes_between():
            session._resume_for(leviathan.PAUSED_USER)
            session.worker._rearm(session)
            session.worker.session_ready(session, leviathan_linux.READ)

        self.on_thread(session, resume_while_a_poll_comes_between)
        self.record.wait_for("on_closed")
        assert self.record.packets() == [b"stop", b"kept"]
        assert self.record.of("disconnect")[0][3][0] is leviathan.Reason.NORMAL

    # -- edges: what must not be waited for in vain ------------------------------------------------------------------

    def test_a_session_with_nothing_unsent_is_watched_for_edges(self):
        """And pays no second look of the kernel for each message; see the head of leviathan_linux."""
        _, session, _ = self.pair()
        interest = self.on_thread(session, lambda: session.interest)
        assert interest == select.EPOLLIN | select.EPOLLPRI | select.EPOLLET | 0x2000       # EPOLLRDHUP

    def test_what_a_full_read_has_left_is_read_though_nothing_more_comes(self):
        """Many small packets, more than one read takes: the rest is no edge of its own."""
        self.settings_before["SCRATCH"], leviathan_linux.SCRATCH = leviathan_linux.SCRATCH, 1024
        _, session, client = self.pair()
        go = self.hold(session)
        client.sendall(self.packed(*[b"x" * 28] * 400))     # whole packets in each full read: nothing is partial
        go.set()
        self.record.wait_for("packet", 400)

    @pytest.mark.parametrize("size", [3000, 300000])
    def test_what_a_full_recvbuf_has_left_is_read_though_nothing_more_comes(self, size):
        _, session, client = self.pair()
        client.sendall(self.packed(b"x" * size)[:10])       # from here on it is received into a RecvBuf of its own
        self.record.wait(lambda: self.on_thread(session, lambda: session.partial is not None))
        go = self.hold(session)
        client.sendall(self.packed(b"x" * size)[10:] + self.packed(b"behind it"))
        go.set()
        self.record.wait_for("packet", 2)

    def test_an_end_that_comes_with_the_last_bytes_is_seen(self):
        _, session, client = self.pair(on_eof=lambda session: None)
        go = self.hold(session)
        client.sendall(self.packed(b"last words"))
        client.shutdown(socket.SHUT_WR)
        go.set()
        self.record.wait_for("packet")
        self.record.wait_for("on_eof")
        assert self.turns(session.communicator.queue) < TURNS
        session.close()

    def test_what_stands_behind_an_urgent_mark_is_read(self):
        """A read stops at TCP's urgent mark, short, though there is more."""
        _, session, client = self.pair(framing=leviathan.Raw())
        go = self.hold(session)
        client.sendall(b"before")
        client.send(b"!", socket.MSG_OOB)
        client.sendall(b"behind")
        go.set()
        self.record.wait(lambda: b"".join(self.record.packets(session)) == b"beforebehind")
        client.send(b"!", socket.MSG_OOB)                   # the mark alone, with nothing to be read
        assert self.turns(session.communicator.queue) < TURNS
        client.sendall(b"more")
        self.record.wait(lambda: b"".join(self.record.packets(session)) == b"beforebehindmore")

    def test_what_came_while_paused_is_read_though_nothing_more_comes(self):
        _, session, client = self.pair()
        session.pause()
        self.on_thread(session, int)
        client.sendall(self.packed(b"meanwhile"))
        assert self.turns(session.communicator.queue) < TURNS
        session.resume()
        self.record.wait_for("packet")

    def test_a_turn_that_fails_does_not_lose_the_events_behind_it(self, monkeypatch):
        """What no handler's error is, but a fault inside of the loop, is reported, and every session looked at again."""
        communicator, listener = self.serve()
        clients = [self.client(listener) for _ in range(5)]
        self.record.wait_for("connect", 5)
        first, = (session for session in communicator.sessions if session.peer == clients[0].getsockname())
        core = communicator.queue.engine.core
        on_eof = core.on_eof

        def faulty(session):
            monkeypatch.setattr(core, "on_eof", staticmethod(on_eof))
            raise RuntimeError("a fault inside of the loop")

        monkeypatch.setattr(core, "on_eof", staticmethod(faulty))
        go = self.hold(first)
        clients[0].close()
        for client in clients[1:]:
            client.sendall(self.packed(b"x"))
        go.set()
        self.record.wait_for("packet", 4)
        self.record.wait_for("on_closed", target=first)
        assert self.record.count("on_failed") == 1

    def test_a_turn_that_fails_again_and_again_does_not_spin(self, monkeypatch):
        queue = self.queue()
        core, failing = queue.engine.core, [True]
        reserve = core.reserve

        def faulty(listener):
            if failing[0]:
                raise RuntimeError("on purpose")
            return reserve(listener)

        monkeypatch.setattr(core, "reserve", staticmethod(faulty))
        _, listener = self.serve(lambda session, packet: session.send(packet), queue=queue)
        client = self.client(listener)
        client.sendall(self.packed(b"at last"))
        self.record.wait_for("on_failed", 2)
        assert self.turns(queue) < TURNS and self.record.count("on_failed") < TURNS
        failing[0] = False
        assert self.read(client, 11) == self.packed(b"at last")

    def test_interest_in_writing_stands_only_while_something_is_unsent(self):
        _, session, client = self.pair(high_water=1 << 24)

        def interest():
            return self.on_thread(session, lambda: session.interest)

        armed = select.EPOLLIN | leviathan_linux.EDGE
        assert interest() == armed
        session.send(b"small")
        assert interest() == armed
        session.write(b"x" * 8000000, lambda session, ok: self.record.add("sent", session, ok))
        assert interest() == select.EPOLLIN | select.EPOLLOUT
        self.read(client, 9 + 8000000)
        self.record.wait_for("sent")
        assert interest() == armed
        session.pause()
        assert interest() == 0
        assert self.on_thread(session, lambda: session.socket.fileno() in session.worker.streams) is False
        session.resume()
        self.on_thread(session, int)
        assert interest() == armed

    # -- accept -------------------------------------------------------------------------------------------------------

    def test_an_aborted_connection_costs_only_itself(self):
        with faulty(leviathan_linux, Plan("accept", 1, errno.ECONNABORTED, times=3)) as plan:
            _, listener = self.serve(lambda session, packet: session.send(packet))
            client = self.client(listener)
            client.sendall(self.packed(b"x"))
            assert self.read(client, 5) == self.packed(b"x")
        assert plan.fired == 3 and self.record.count("on_listener_failed") == 0

    @pytest.mark.parametrize("error", ["EMFILE", "ENFILE", "ENOBUFS", "ENOMEM"])
    def test_a_shortage_pauses_accepting_with_a_doubling_pause(self, monkeypatch, error, caplog):
        monkeypatch.setattr(leviathan_linux, "ACCEPT_PAUSE_MAX", 0.15)
        with faulty(leviathan_linux, Plan("accept", 2, getattr(errno, error), times=3)) as plan:
            communicator, listener = self.serve(lambda session, packet: session.send(packet))
            # The second call of accept is the one that would say EAGAIN, or the second client's.
            inside, waiting = self.client(listener), self.client(listener)
            self.record.wait_for("on_listener_failed")
            inside.sendall(self.packed(b"goes on"))
            assert self.read(inside, 11) == self.packed(b"goes on")
            waiting.sendall(self.packed(b"x"))
            assert self.read(waiting, 5) == self.packed(b"x")
        assert plan.fired == 3
        pauses = [what[1] for _, _, _, what in self.record.of("on_listener_failed")]
        assert pauses == [0.1, 0.15, 0.15]
        assert len([line for line in caplog.records if "cannot accept" in line.getMessage()]) == 1
        assert communicator.queue.statistics()["turns"] < 60

    def test_a_later_shortage_is_told_again(self, monkeypatch, caplog):
        monkeypatch.setattr(leviathan, "REPORT_PAUSE", 0.0)
        with faulty(leviathan_linux, Plan("accept", 2, errno.EMFILE, times=2)):
            _, listener = self.serve(lambda session, packet: session.send(packet))
            clients = [self.client(listener), self.client(listener)]
            for client in clients:
                client.sendall(self.packed(b"x"))
                assert self.read(client, 5) == self.packed(b"x")
        assert len([line for line in caplog.records if "cannot accept" in line.getMessage()]) == 2

    def test_descriptors_run_out_and_come_back(self):
        # The real thing: no descriptor is left in this process.
        import resource
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        communicator, listener = self.serve(lambda session, packet: session.send(packet))
        first = self.client(listener)
        self.record.wait_for("connect")
        second = socket.socket()
        self.sockets.append(second)
        second.settimeout(5)
        taken = []
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(second.fileno() + 8, 32), hard))
        try:
            while True:
                try:
                    taken.append(os.dup(0))
                except OSError:
                    break
            second.connect(listener.address)
            self.record.wait_for("on_listener_failed")
            first.sendall(self.packed(b"goes on"))
            assert self.read(first, 11) == self.packed(b"goes on")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for fd in taken:
                os.close(fd)
        second.sendall(self.packed(b"x"))
        assert self.read(second, 5) == self.packed(b"x")

    def test_an_accept_that_fails_for_good_closes_the_listener_only(self):
        with faulty(leviathan_linux, Plan("accept", 2, errno.EINVAL)):
            _, listener = self.serve(lambda session, packet: session.send(packet))
            client = self.client(listener)
            self.record.wait_for("on_listener_failed")
            client.sendall(self.packed(b"x"))
            assert self.read(client, 5) == self.packed(b"x")
            assert listener.closed

    # -- sending ------------------------------------------------------------------------------------------------------

    def test_what_other_threads_have_queued_in_a_row_leaves_in_one_send(self):
        _, session, client = self.pair()
        before = session.communicator.queue.statistics()["sends"]
        go = self.hold(session)
        for number in range(1000):
            assert session.write(struct.pack(">I", number))
        go.set()
        assert self.read(client, 4000) == b"".join(struct.pack(">I", number) for number in range(1000))
        self.on_thread(session, int)
        assert session.communicator.queue.statistics()["sends"] - before == 1
        assert session.backlog == 0

    def test_a_sendbuf_holds_what_the_kernel_does_not_take_and_goes_back_when_it_has(self):
        # B1, B3: one for the outstanding send, none before and none after it.
        _, session, client = self.pair(high_water=1 << 24)
        sent = 0
        while not self.manager.statistics()["operations"]:
            assert self.manager.statistics()["leased"] == 0
            assert session.write(b"x" * 30000)
            sent += 30000
            self.on_thread(session, int)
        counts = self.manager.statistics()
        assert (counts["operations"], counts["leased"]) == (1, 1)
        assert session.backlog <= counts["memory"] <= 1 << 16
        assert self.read(client, sent) == b"x" * sent
        self.on_thread(session, int)
        counts = self.manager.statistics()
        assert (counts["operations"], counts["leased"], counts["memory"]) == (0, 0, 0)

    @pytest.mark.parametrize("replies", [0, 3])
    def test_each_chunk_that_is_queued_is_counted_once(self, replies):
        # Counting them all again for each of them made a handler that wrote 65,536 single bytes a matter of 40 s.
        Counted.asked = 0

        def handler(session, packet):
            for _ in range(replies):
                session.send(b"a reply")
            for _ in range(500):
                assert session.worker.enqueue(session, (Counted(b"c"),), None)
            counts.append(session.unsent)
            session.send(b"a reply")                # behind so many chunks they leave with it
            assert session.worker.enqueue(session, (Counted(b""), Counted(b"c")), None)

        counts = []
        _, session, client = self.pair(handler)
        reply = self.packed(b"a reply")
        client.sendall(self.packed(b"go") * 2)      # two, since the first reply to a single packet leaves at once
        sent = replies * reply + 500 * b"c" + reply + b"c"
        assert self.read(client, 2 * len(sent)) == 2 * sent
        counted = replies * len(reply) + 500
        assert counts == [counted, 1 + counted]     # the first one's last byte is still there
        assert Counted.asked < 5000

    def test_what_is_queued_is_not_counted_anew_for_each_part_that_leaves(self):
        Counted.asked = 0

        def handler(session, packet):
            for _ in range(1000):
                assert session.worker.enqueue(session, (chunk,), None)
                session.send(b"small")              # where nothing is outstanding it is not counted before it leaves

        chunk = Counted(10000)                      # of this size they leave without being joined, 64 at a time
        _, session, client = self.pair(handler, high_water=1 << 26, send_limit=1 << 26)
        client.sendall(self.packed(b"go") * 2)
        sent = (chunk + self.packed(b"small")) * 1000
        assert self.read(client, 2 * len(sent)) == 2 * sent
        assert self.on_thread(session, lambda: session.backlog) == 0
        assert Counted.asked < 10 * 2000

    # -- wakeups ------------------------------------------------------------------------------------------------------

    def test_the_wakeup_is_drained(self):
        _, session, client = self.pair(queue=self.queue(2))
        queue = session.communicator.queue
        for _ in range(500):
            session.send(b"wake")
            queue.engine.post(int)
        self.read(client, 500 * 8)
        assert self.turns(queue) < 2 * TURNS
        descriptors = [queue.engine.wakeup.fileno()] + [worker.wakeup.fileno() for worker in queue.engine.workers]
        assert select.select(descriptors, [], [], 0)[0] == []

    def test_a_wakeup_signalled_often_is_drained_at_once(self):
        wakeup = leviathan_linux.Wakeup()
        try:
            for _ in range(100):
                wakeup.signal()
            assert select.select([wakeup.fileno()], [], [], 0)[0]
            wakeup.drain()
            assert not select.select([wakeup.fileno()], [], [], 0)[0]
            wakeup.drain()
        finally:
            wakeup.close()

    def test_a_socketpair_serves_as_well_as_an_eventfd(self, monkeypatch):
        monkeypatch.delattr(os, "eventfd", raising=False)
        _, session, client = self.pair(lambda session, packet: session.send(packet))
        assert session.worker.wakeup._pair
        client.sendall(self.packed(b"x"))
        session.send(b"y")
        assert sorted([self.read(client, 5), self.read(client, 5)]) == [self.packed(b"x"), self.packed(b"y")]

    def test_a_busy_peer_starves_nobody(self):
        # One bounded read per readiness: a peer that never stops leaves room for the others.
        import threading
        over = threading.Event()

        def flood(sock):
            try:
                while not over.is_set():
                    sock.sendall(b"\0\0\0\1f" * 50000)
            except OSError:
                pass

        _, listener = self.serve(lambda session, packet: session.send(b"polite") if packet == b"polite" else None)
        busy, polite = self.client(listener), self.client(listener)
        thread = threading.Thread(target=flood, args=(busy,))
        thread.start()
        try:
            for _ in range(5):
                polite.sendall(self.packed(b"polite"))
                assert self.read(polite, 10) == self.packed(b"polite")
        finally:
            over.set()
            for _, session, _, _ in self.record.of("connect"):
                session.abort()
            thread.join()

    def test_no_descriptor_is_left(self):
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            _, session, client = self.pair(lambda session, packet: session.send(packet), queue=self.queue(2))
            client.close()
            self.record.wait_for("on_closed", target=session)
            session.communicator.queue.stop()
            for listener in session.communicator.listeners:
                assert listener.socket.fileno() == -1
            for queue in self.queues:
                queue.stop()
        assert len(os.listdir("/proc/self/fd")) == before

    def test_leviathan_asks_for_this_engine(self):
        assert leviathan._engine is leviathan_linux
