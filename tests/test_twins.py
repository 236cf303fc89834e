"""The engines are twins (DESIGN 1): `diff -y leviathan_linux.py leviathan_win.py` is to read as a lesson.

What both have stands in the same order, with the same signatures, and says the same. What only one has is named here,
with the reason, and in docs/architecture.md.
"""
import ast
import os
import re

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
EPOLL, IOCP = "leviathan_linux.py", "leviathan_win.py"

# What only one engine has. {class: {name: why}}
ONLY_EPOLL = {
    "Engine": {},
    "Worker": {
        "post": "a thread has its mail, on a port each session has",
        "wake": "each epoll sleeps by itself; a port is woken by a packet", "_signal": "as wake",
        "_mail_ready": "as wake", "_events_ready": "as wake: a packet is an event already, and `_event` takes it",
        "_add_up": "as restore", "_reach": "as _dispatch",
        "_tidy": "descriptors are closed behind a batch, or a new socket gets the events of an old one",
        "_end": "an epoll and a wakeup descriptor for each thread", "_dispatch": "descriptors, not operations, are found",
        "_disarm_listener": "an accept that is outstanding needs no watching",
        "_rearm": "what is watched is told to the epoll; on a port `_arm` begins the next operation",
        "_watch": "as _rearm", "_look_again": "as _rearm", "session_ready": "readiness: the call is still to be made",
        "enqueue_foreign": "a foreign thread's bytes go by the owner's mail; on a port all take the session's lock",
        "_enqueue_posted": "as enqueue_foreign", "_attempt": "as enqueue_foreign: several of these leave together",
        "_append": "as enqueue_foreign", "_check_limits": "as enqueue_foreign",
        "restore": "the fast path of Session.send needs an owner for life", "flush_early": "as restore",
        "send_failed": "as restore", "outstanding": "as restore", "_progress": "as restore",
        "_flush": "the dirty list is a thread's; on a port `_settle` flushes one session",
        "_send_gather": "sendmsg; WSASend gets what is joined, or one large chunk",
        "_begin_send": "a send becomes outstanding when the kernel takes less than all; on a port it always is",
        "_rearm_sending": "EPOLLOUT", "_send_more": "EPOLLOUT; on a port `_sent`",
        "_watch_closing": "on a port `_settle_closing`", "_drained": "on a port `_settle_closing`",
        "_drained_to_end": "on a port `_settle_closing`"},
}
ONLY_IOCP = {
    "Console": {"_handle": "Windows calls it; on Linux it is a signal"},
    "Engine": {
        "_own": "sessions are the engine's, not a thread's", "submit": "posts for the engine itself; Worker.post on epoll"},
    "Worker": {
        "_patience": "the port wants milliseconds", "_event": "what was posted comes as a packet",
        "_timed_out": "the port fails when the time is over",
        "_is_kept": "one of the workers wakes for the timers", "_keep_time": "as _is_kept",
        "_attend": "a session has an owner for a while", "_serve": "as _attend", "_let_go": "as _attend",
        "_arm_accept": "AcceptEx is begun before anybody comes", "_accepted": "its completion", "_let_in": "room or no room",
        "_connected": "on the owner, what `_dialled` has taken from the port", "_fail": "ends in `_settle`",
        "_arm": "WSARecv is begun before there are bytes", "_arm_unless_paused": "as _arm",
        "_take_in": "on the owner, what `_receive` has taken",
        "_press": "the water marks are passed on any thread, and told on the owner",
        "_transmit": "WSASend", "_send_failed": "of a send that could not be begun", "_sent": "the completion of WSASend",
        "_settle": "what the state asks for, in one place", "_settle_closing": "as _settle", "_plan": "as _settle",
        "_operation": "records of outstanding calls", "_free": "as _operation"},
}
# Same name and part, other arguments: the completion's own.
OTHER_ARGUMENTS = {"_accept", "_dialled", "_receive", "_closed"}
# Same contract, and one word more about what the other cannot have.
OTHER_WORDS = {"choose", "schedule", "enqueue", "_closed", "_accept", "_dialled", "_established", "_turn", "_turn_stopping",
               "_finished", "_receive", "_send_now", "_discard"}


def tree_of(name):
    with open(os.path.join(ROOT, name), encoding="utf-8") as file:
        return ast.parse(file.read())


def classes(name):
    return {node.name: node for node in tree_of(name).body if isinstance(node, ast.ClassDef)}


def methods(node):
    return {member.name: member for member in node.body if isinstance(member, ast.FunctionDef)}


def signature(function):
    arguments = function.args
    names = [argument.arg for argument in arguments.args] + ["*" + argument.arg for argument in
                                                             [arguments.vararg] if argument]
    return names, [ast.dump(default) for default in arguments.defaults], [
        ast.dump(argument.annotation) for argument in arguments.args if argument.annotation]


def sections(name):
    with open(os.path.join(ROOT, name), encoding="utf-8") as file:
        text = file.read()
    return re.findall(r"^# -{80,}\n# (.*)\n# -{80,}$", text, re.M), re.findall(r"^    # -- (.*?) -+$", text, re.M)


def test_sections_have_the_same_titles_in_the_same_order():
    top, inner = sections(EPOLL)
    assert top == ["Constants", "System calls: what waits, and what wakes", "Timers", "Engine", "Worker"]
    assert sections(IOCP)[0] == top
    others = [title.replace("any thread: sending", "owner thread: sending") for title in sections(IOCP)[1]]
    others.remove("owner thread: owning")               # a thread that has a session for life needs none
    assert others == inner and len(inner) == 10


def test_classes_and_methods_are_the_same_in_the_same_order():
    ours, theirs = classes(EPOLL), classes(IOCP)
    order = ["Console", "Timer", "Engine", "Worker"]
    assert [name for name in ours if name in theirs] == order and [name for name in theirs if name in ours] == order
    for name in order:
        here, there = methods(ours[name]), methods(theirs[name])
        assert set(here) - set(there) == set(ONLY_EPOLL.get(name, ())), name
        assert set(there) - set(here) == set(ONLY_IOCP.get(name, ())), name
        assert [method for method in here if method in there] == [method for method in there if method in here], name
        for method in here:
            if method in there and method not in OTHER_ARGUMENTS:
                assert signature(here[method]) == signature(there[method]), (name, method)


def test_verbs_are_all_there():
    """DESIGN 2 and docs/architecture.md: what the core calls; there is nothing public that only one engine has."""
    verbs = ["start", "stop", "statistics", "listen", "accept", "connect", "attach", "receive", "pause", "send", "close",
             "shutdown", "unlisten", "heard", "owns", "run_on_owner", "post", "call_later"]
    for name in (EPOLL, IOCP):
        assert [method for method in methods(classes(name)["Engine"]) if method in verbs] == verbs


def test_what_both_have_says_the_same():
    ours, theirs = classes(EPOLL), classes(IOCP)
    compared = 0
    for name in ("Timer", "Engine", "Worker"):
        here, there = methods(ours[name]), methods(theirs[name])
        for method in here:
            if method in there and method not in OTHER_WORDS:
                assert ast.get_docstring(here[method]) == ast.get_docstring(there[method]), (name, method)
                compared += bool(ast.get_docstring(here[method]))
    assert compared > 25


def test_constants_that_both_have_are_the_same():
    values = []
    for name in (EPOLL, IOCP):
        values.append({node.targets[0].id: ast.dump(node.value) for node in tree_of(name).body
                       if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
                       and node.targets[0].id.isupper()})
    ours, theirs = values
    both = [key for key in ours if key in theirs]
    assert both == [key for key in theirs if key in ours]
    assert {"DRAIN", "LINGER", "ACCEPT_PAUSE", "ACCEPT_PAUSE_MAX", "MAX_EVENTS", "JOIN_MAX", "FOREVER"} <= set(both)
    for key in set(both) - {"NAME", "ACCEPT_LATER"}:
        assert ours[key] == theirs[key], key


def test_what_only_one_has_is_in_the_documentation():
    with open(os.path.join(ROOT, "docs", "architecture.md"), encoding="utf-8") as file:
        text = file.read()
    for table in (ONLY_EPOLL, ONLY_IOCP):
        for names in table.values():
            for name in names:
                assert "`%s`" % name in text, name
