use super::*;
use crate::units::{NS_PER_MS, NS_PER_US};

/// How long the requests of a turn of the core take, and a poll of a background that does nothing.
const REQUESTS_NS: u64 = 2_000;
const SLICE_NS_MAX: u64 = 64_000;
const POLL_NS: u64 = 20;
const SLICE_NS: u64 = 8_000;
const LOOK_NS: u64 = 200;

/// A cache on the core.
struct Cache {
    contender: Contender,
    /// What it has to do, for ever; `None`: nothing.
    work: Option<Pressure>,
    slices: u64,
    looks: u64,
    worked_ns: u64,
}

/// A core that goes round its requests and its backgrounds.
struct Core {
    now: Now,
    beside: Beside,
    requests_ns: u64,
    caches: Vec<Cache>,
    /// When slices of work ended, and the next one began.
    gaps_ns: Vec<u64>,
    last_end: Now,
}

impl Core {
    fn new(works: &[Option<Pressure>]) -> Self {
        let core_time = Rc::new(CoreTime::default());
        let cache = |&work| Cache {
            contender: Contender::new(Rc::clone(&core_time)),
            work,
            slices: 0,
            looks: 0,
            worked_ns: 0,
        };
        Self {
            now: Now(1),
            beside: Beside::Requests,
            requests_ns: REQUESTS_NS,
            caches: works.iter().map(cache).collect(),
            gaps_ns: Vec::new(),
            last_end: Now(1),
        }
    }

    fn run_ms(&mut self, ms: u64) {
        let end = self.now.0 + ms * NS_PER_MS;
        while self.now.0 < end {
            if self.beside == Beside::Requests {
                self.now.0 += self.requests_ns;
            }
            for number in 0..self.caches.len() {
                self.poll(number);
            }
        }
    }

    fn poll(&mut self, number: usize) {
        self.now.0 += POLL_NS;
        let cache = &mut self.caches[number];
        if !cache.contender.is_worth_a_look() || !cache.contender.may_begin(self.now) {
            return;
        }
        let start = self.now;
        let (done, pressure) = if let Some(pressure) = cache.work {
            self.gaps_ns.push(start.since_ns(self.last_end));
            let slice_ns = cache.contender.slice_ns(SLICE_NS, SLICE_NS_MAX);
            self.now.0 += slice_ns;
            self.last_end = self.now;
            cache.slices += 1;
            cache.worked_ns += slice_ns;
            (Done::Part, pressure)
        } else {
            self.now.0 += LOOK_NS;
            cache.looks += 1;
            (Done::Nothing, Pressure::NONE)
        };
        let slice = (start, self.now);
        cache.contender.ended(slice, self.beside, done, pressure);
    }

    /// The shares of the time that the caches had, in tenths of a percent.
    fn shares(&self) -> Vec<u64> {
        let permille = |cache: &Cache| cache.worked_ns * 1000 / self.now.0;
        self.caches.iter().map(permille).collect()
    }
}

/// Polls without a look at the clock, at most.
fn polls_let_go(contender: &Contender) -> usize {
    let mut polls = 0;
    while !contender.is_worth_a_look() {
        polls += 1;
    }
    polls
}

fn assert_near(what: u64, wanted: u64) {
    let allowed = wanted / 8 + 1;
    assert!(what.abs_diff(wanted) <= allowed, "{what}, not {wanted}");
}

#[test]
fn a_cache_alone_rests_by_its_own_need() {
    let rests = [
        (Pressure::NONE, 32_000),
        (Pressure::WANTED, 3_764),
        (Pressure::WAITING, 0),
    ];
    for (pressure, rest_ns) in rests {
        let contender = Contender::new(Rc::new(CoreTime::default()));
        assert!(contender.may_begin(Now(0)));
        let slice = (Now(0), Now(SLICE_NS));
        contender.ended(slice, Beside::Requests, Done::Part, pressure);
        if rest_ns > 0 {
            // Once around its pollers, the core comes back.
            assert!(!contender.may_begin(Now(SLICE_NS + POLL_NS)));
            assert_eq!(polls_let_go(&contender), 8);
            assert!(!contender.may_begin(Now(SLICE_NS + rest_ns - 1)));
            assert_eq!(polls_let_go(&contender), 0, "the next one is in time");
        }
        assert!(contender.may_begin(Now(SLICE_NS + rest_ns)));
    }
}

#[test]
fn a_cache_without_work_naps_until_it_is_woken() {
    let contender = Contender::new(Rc::new(CoreTime::default()));
    let end = Now(SLICE_NS);
    contender.ended((Now(0), end), Beside::Nobody, Done::All, Pressure::NONE);
    assert!(!contender.may_begin(Now(end.0 + POLL_NS)));
    assert!(!contender.is_worth_a_look());
    assert!(!contender.may_begin(Now(end.0 + IDLE_NAP_NS - 1)));
    contender.wake();
    assert!(contender.is_worth_a_look());
    assert!(contender.may_begin(end));
    contender.ended((end, end), Beside::Nobody, Done::Nothing, Pressure::NONE);
    assert!(contender.may_begin(Now(end.0 + IDLE_NAP_NS)));
}

#[test]
fn however_many_caches_work_requests_keep_their_share() {
    for count in [1, 2, 5, 16] {
        for busy in [1, 2, 5, 16] {
            if busy > count {
                continue;
            }
            let works: Vec<_> = (0..count)
                .map(|number| (number >= count - busy).then_some(Pressure::NONE))
                .collect();
            let mut core = Core::new(&works);
            core.run_ms(100);
            let shares = core.shares();
            let taken: u64 = shares.iter().sum();
            // A little is lost to the time between two looks at the clock.
            assert!((120..=200).contains(&taken), "{taken} of {count}, {busy}");
            let working = count - busy..count;
            for &share in &shares[working] {
                assert_near(share, taken / busy as u64);
            }
            let shortest = core.gaps_ns.iter().skip(1).min().expect("slices");
            assert!(*shortest >= 4 * SLICE_NS, "{shortest}");
            // A nap, and a round of those that work.
            let looks_min = 100_000 / (100 + 55 * busy as u64);
            for cache in core.caches.iter().filter(|cache| cache.work.is_none()) {
                assert!(cache.looks > looks_min, "{} looks", cache.looks);
            }
        }
    }
}

#[test]
fn who_needs_more_gets_more_and_nobody_is_left_out() {
    let works = [
        Pressure::NONE,
        Pressure::WAITING,
        Pressure::NONE,
        Pressure::WANTED,
    ];
    let mut core = Core::new(&works.map(Some));
    core.run_ms(100);
    // The turns are those of shares of 20, 100, 20 and 68 percent, and one is always wanted at once.
    let shares = core.shares();
    let taken: u64 = shares.iter().sum();
    assert!(taken > 750, "{taken}");
    for (share, weight) in shares.into_iter().zip([20, 100, 20, 68]) {
        assert_near(share, taken * weight / 208);
    }
}

#[test]
fn without_requests_nobody_rests_and_turns_are_as_fair() {
    let mut core = Core::new(&[Some(Pressure::NONE); 3]);
    core.beside = Beside::Nobody;
    core.run_ms(10);
    let shares = core.shares();
    assert!(shares.iter().sum::<u64>() > 950, "{shares:?}");
    for share in shares {
        assert_near(share, 330);
    }
}

#[test]
fn one_that_had_nothing_to_do_has_saved_up_nothing() {
    let mut core = Core::new(&[Some(Pressure::NONE), None]);
    core.run_ms(50);
    let before = core.caches[0].slices;
    core.caches[1].work = Some(Pressure::NONE);
    core.run_ms(10);
    assert_near(core.caches[0].slices - before, core.caches[1].slices);
}

#[test]
fn one_that_comes_no_more_holds_nobody_up() {
    for is_dropped in [false, true] {
        let mut core = Core::new(&[Some(Pressure::NONE); 2]);
        core.run_ms(1);
        let gone = core.caches.pop().expect("two");
        if is_dropped {
            drop(gone);
        } else {
            gone.contender.give_up();
        }
        let before = core.caches[0].slices;
        core.run_ms(10);
        let after = core.caches[0].slices - before;
        assert!(after > 10 * NS_PER_MS / (60 * NS_PER_US), "{after}");
    }
}

#[test]
fn a_long_look_counts_as_work() {
    let core_time = Rc::new(CoreTime::default());
    let [long, other] = [0, 1].map(|_| Contender::new(Rc::clone(&core_time)));
    for (took_ns, begins) in [(LOOK_NS_MAX, true), (NS_PER_MS, false)] {
        let slice = (Now(0), Now(took_ns));
        long.ended(slice, Beside::Requests, Done::Nothing, Pressure::NONE);
        assert_eq!(other.may_begin(Now(took_ns)), begins);
    }
}

/// Requests of a deep queue are all served in one turn, which takes far longer than a short slice and its rest.
#[test]
fn where_requests_take_long_slices_do_too_so_that_the_share_is_had() {
    for count in [1, 3] {
        // Of the lowest share some is lost to the time between two turns, as long as it is enough.
        for (pressure, permille) in [(Pressure::NONE, 160), (Pressure::WANTED, 680)] {
            let mut core = Core::new(&vec![Some(pressure); count]);
            core.requests_ns = 14_000;
            core.run_ms(100);
            assert_near(core.shares().iter().sum(), permille);
        }
    }
    let mut core = Core::new(&[Some(Pressure::WANTED)]);
    core.requests_ns = 14_000;
    core.run_ms(100);
    let slice_ns = core.caches[0].worked_ns / core.caches[0].slices;
    assert_near(slice_ns, 14_000 * 68 / 32);
    // They are short again when requests are.
    core.requests_ns = REQUESTS_NS;
    core.run_ms(100);
    let slice_ns = core.caches[0].contender.slice_ns(SLICE_NS, SLICE_NS_MAX);
    assert_eq!(slice_ns, SLICE_NS);
}

#[test]
fn no_slice_is_longer_than_the_longest_nor_all_of_those_that_follow_one_another() {
    for count in [1, 4] {
        let mut core = Core::new(&vec![Some(Pressure::WAITING); count]);
        core.requests_ns = 14_000;
        core.run_ms(10);
        let slice_ns = core.caches[0].contender.slice_ns(SLICE_NS, SLICE_NS_MAX);
        assert_eq!(slice_ns, SLICE_NS_MAX / count as u64);
        // There are no requests left but a few: those that wait for all this.
        core.requests_ns = 500;
        core.run_ms(10);
        let slice_ns = core.caches[0].contender.slice_ns(SLICE_NS, SLICE_NS_MAX);
        assert_eq!(slice_ns, SLICE_NS);
    }
}

#[test]
fn a_turn_without_requests_is_a_turn_too() {
    let mut core = Core::new(&[Some(Pressure::WANTED)]);
    core.requests_ns = 14_000;
    core.run_ms(10);
    core.beside = Beside::Nobody;
    core.run_ms(1);
    let slice_ns = core.caches[0].contender.slice_ns(SLICE_NS, SLICE_NS_MAX);
    assert_eq!(slice_ns, SLICE_NS);
}
