"""What is on its way between two providers: of each request at most one thing, and of each provider one advert."""

from wwwserve.agents.kernel import kernel
from wwwserve.envs.state import NOTHING, OFFER


@kernel
def is_sooner(q, r, s):
    """Whether what is on its way of request r is there before that of s; at one instant, the first sender's is."""
    if q[r].mail_s != q[s].mail_s:
        return q[r].mail_s < q[s].mail_s
    r_from = q[r].origin if q[r].mail == OFFER else q[r].executor
    s_from = q[s].origin if q[s].mail == OFFER else q[s].executor
    return r_from < s_from


@kernel
def send(w, r, mail, at_s):
    """Something of request r will be there at `at_s`."""
    m, q = w.m, w.q
    q[r].mail, q[r].mail_s, q[r].mail_next = mail, at_s, -1
    if m.mail_head < 0:
        m.mail_head = m.mail_tail = r
    elif not is_sooner(q, r, m.mail_tail):
        q[m.mail_tail].mail_next = r
        m.mail_tail = r
    elif is_sooner(q, r, m.mail_head):
        q[r].mail_next = m.mail_head
        m.mail_head = r
    else:
        before = m.mail_head
        while not is_sooner(q, r, q[before].mail_next):
            before = q[before].mail_next
        q[r].mail_next = q[before].mail_next
        q[before].mail_next = r


@kernel
def take(w):
    """The request whose mail is there first, taken off the list; what it was is still in its `mail`."""
    m, q = w.m, w.q
    r = m.mail_head
    m.mail_head = q[r].mail_next
    if m.mail_head < 0:
        m.mail_tail = -1
    q[r].mail_next = -1
    return r


@kernel
def forget(w, r):
    """What is on its way of request r is not wanted any more."""
    m, q = w.m, w.q
    if q[r].mail == NOTHING:
        return
    q[r].mail = NOTHING
    if m.mail_head == r:
        take(w)
        return
    before = m.mail_head
    while q[before].mail_next != r:
        before = q[before].mail_next
    q[before].mail_next = q[r].mail_next
    if m.mail_tail == r:
        m.mail_tail = before
    q[r].mail_next = -1
