//! Whether packing pays: decided while memory moves, from what is measured.
//!
//! ```text
//!        samples say it could be faster         a window says it was
//!  as it is ------------------------> try a codec -----------------> keep it
//!     ^                                   |                             |
//!     +------- it was no faster ----------+---- guests need the CPU ----+
//!              (wait longer before the next try)
//! ```
//!
//! There is one for all lanes of a migration, behind a lock taken once a batch. A lane says what
//! it sent and what that took; the bytes that the peer's kernel has acknowledged tell how fast the
//! link really is, whatever lies in socket buffers. Rates are those of guest memory: what travels
//! in a third of its size counts three times.
//!
//! A way of sending is judged by a window of its own in which nothing of the way before is under
//! way any more. What a codec might do is told from samples: now and then a chunk is packed and
//! thrown away, for at most [`SAMPLE_SHARE`] of the time. Only what samples promise is tried, and
//! what has lost is tried again later and later; so memory that does not pack costs no more than
//! the samples.
//!
//! Deliberately not here: clocks, files of `/proc`, and the bytes.

use std::time::Duration;

use crate::codec::Codec;

/// One in so many: the share of a lane's time that samples may take.
pub const SAMPLE_SHARE: u32 = 100;
/// A window is at least this long, so that the scheduler's slices are averaged ...
const WINDOW_MIN: Duration = Duration::from_millis(80);
/// ... and has at least so many bytes acknowledged: a few batches ...
const WINDOW_BYTES: u64 = 2 << 20;
/// ... unless the link is so slow that this passes.
const WINDOW_MAX: Duration = Duration::from_secs(1);
/// A codec is tried if samples promise this much more, and kept if it brings [`GAIN_KEEP`].
const GAIN_TRY: f64 = 1.15;
/// See [`GAIN_TRY`]. It costs processor time, so a tie is no reason to pack.
const GAIN_KEEP: f64 = 1.05;
/// The way back needs less: sending as it is costs nothing.
const GAIN_BACK: f64 = 1.02;
/// How long what was tried and lost is left alone, doubled each time, up to [`RETRY_MAX`].
const RETRY: Duration = Duration::from_secs(2);
/// See [`RETRY`].
const RETRY_MAX: Duration = Duration::from_secs(60);
/// How long a measured rate is believed while another way is in use.
const BELIEVED: Duration = Duration::from_secs(5);
/// A lane that spends more than this share of its time in sending waits for the link.
const LINK_BOUND: f64 = 0.4;
/// What the kernel takes to send a byte, in ns: its copy and its checksums.
const SEND_NS_PER_BYTE: f64 = 0.25;
/// A ratio from here on is none.
const RATIO_USELESS: f64 = 0.9;
/// Weight of a new measurement against those before it.
const WEIGHT: f64 = 0.3;

/// What a lane sent at a time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sent {
    /// Bytes of guest memory, zero pages not counted.
    pub raw_bytes: u64,
    /// The bytes that went out for them, headers included.
    pub wire_bytes: u64,
    /// Time it took to pack them.
    pub packing: Duration,
    /// Time until the kernel had taken all of it.
    pub sending: Duration,
    /// Bytes of this lane that the peer has acknowledged since it was opened; `None` where the
    /// kernel doesn't tell.
    pub acked_bytes: Option<u64>,
}

/// How it was so far, for the report.
#[derive(Clone, Debug, PartialEq)]
pub struct Verdict {
    /// The codec in use at the end.
    pub codec: Option<Codec>,
    /// Why that one, or why none.
    pub reason: String,
    /// How often the way was changed.
    pub switches: u32,
}

/// See the [module](self).
#[derive(Debug)]
pub struct Governor {
    /// The first is to send as it is.
    arms: Vec<Arm>,
    active: usize,
    /// Lanes that can work at the same time.
    workers: f64,
    lanes: Vec<Lane>,
    handed_bytes: u64,
    window: Window,
    trial: Option<Trial>,
    next_sample: Duration,
    sampled: usize,
    held_until: Duration,
    reason: String,
    switches: u32,
}

#[derive(Debug, Default)]
struct Arm {
    codec: Option<Codec>,
    /// Wire bytes a byte of memory, and ns to pack it, by samples and by use.
    ratio: Option<f64>,
    ns_per_byte: f64,
    /// Memory bytes a second, and when that was measured.
    rate: Option<(f64, Duration)>,
    lost: u32,
    retry_at: Duration,
}

#[derive(Clone, Copy, Debug, Default)]
struct Lane {
    acked_bytes: u64,
    handed_bytes: u64,
}

#[derive(Debug)]
enum Window {
    /// Until so many bytes are acknowledged, what went out before is still under way.
    Settling {
        until_acked: u64,
    },
    Open(Open),
}

#[derive(Debug, Default)]
struct Open {
    since: Duration,
    acked_before: u64,
    raw_bytes: u64,
    wire_bytes: u64,
    packing: Duration,
    sending: Duration,
}

#[derive(Clone, Copy, Debug)]
struct Trial {
    from: usize,
    rate: f64,
}

impl Governor {
    /// Over `lanes` lanes on `cpus` cores, with these codecs to choose from, fastest first.
    pub fn new(codecs: &[Codec], lanes: usize, cpus: usize) -> Self {
        let codecs = codecs.iter().map(|&codec| Some(codec));
        let arms = [None].into_iter().chain(codecs);
        Self {
            arms: arms.map(|codec| Arm { codec, ..Arm::default() }).collect(),
            active: 0,
            workers: lanes.min(cpus).max(1) as f64,
            lanes: vec![Lane::default(); lanes],
            handed_bytes: 0,
            window: Window::Settling { until_acked: 0 },
            trial: None,
            next_sample: Duration::ZERO,
            sampled: 0,
            held_until: Duration::ZERO,
            reason: "nothing was measured yet".into(),
            switches: 0,
        }
    }

    /// The codec for the next batch.
    pub fn codec(&self) -> Option<Codec> {
        self.arms[self.active].codec
    }

    /// How it stands.
    pub fn verdict(&self) -> Verdict {
        let reason = self.reason.clone();
        Verdict { codec: self.codec(), reason, switches: self.switches }
    }

    /// A round begins: what was measured across the gap before it means nothing.
    pub fn round_begins(&mut self) {
        self.settle();
    }

    /// Whether it is time for a sample, and of which codec. Whoever asks has to take it, and to say
    /// so by [`Self::sampled`].
    pub fn sample_due(&mut self, now: Duration) -> Option<Codec> {
        if now < self.next_sample || now < self.held_until || self.arms.len() == 1 {
            return None;
        }
        self.sampled = self.sampled % (self.arms.len() - 1) + 1;
        if self.sampled == self.active {
            return None;
        }
        // The faster codec says it for all: what it gets nothing out of is noise to the others too.
        if self.arms[1].ratio.is_some_and(|ratio| ratio > RATIO_USELESS) {
            self.sampled = 1;
        }
        // Nobody else samples meanwhile.
        self.next_sample = now + WINDOW_MIN;
        self.arms[self.sampled].codec
    }

    /// A sample was taken.
    pub fn sampled(
        &mut self,
        now: Duration,
        codec: Codec,
        raw: usize,
        packed: usize,
        took: Duration,
    ) {
        self.next_sample = now + took * SAMPLE_SHARE;
        self.learn(codec, raw as f64, packed as f64, took);
    }

    /// The guests of this host wait for the processor, or do not any more.
    pub fn guests_need_cpu(&mut self, now: Duration, need: bool) {
        if !need {
            return;
        }
        self.held_until = now + RETRY;
        if self.active != 0 {
            self.switch(0, "guests need the processor".into());
        } else {
            self.reason = "guests need the processor".into();
        }
    }

    /// A lane sent a batch.
    pub fn sent(&mut self, now: Duration, lane: usize, sent: Sent) {
        let Some(it) = self.lanes.get_mut(lane) else { return };
        it.handed_bytes += sent.wire_bytes;
        it.acked_bytes = sent.acked_bytes.unwrap_or(it.handed_bytes).min(it.handed_bytes);
        self.handed_bytes += sent.wire_bytes;
        let acked = self.acked();
        match &mut self.window {
            Window::Settling { until_acked } if acked < *until_acked => return,
            Window::Settling { .. } => {
                let open = Open { since: now, acked_before: acked, ..Open::default() };
                self.window = Window::Open(open);
                return;
            }
            Window::Open(open) => {
                open.raw_bytes += sent.raw_bytes;
                open.wire_bytes += sent.wire_bytes;
                open.packing += sent.packing;
                open.sending += sent.sending;
                let age = now.saturating_sub(open.since);
                let enough = age >= WINDOW_MIN && acked - open.acked_before >= WINDOW_BYTES;
                if !enough && age < WINDOW_MAX || open.wire_bytes == 0 {
                    return;
                }
            }
        }
        self.close_window(now, acked);
    }

    fn acked(&self) -> u64 {
        self.lanes.iter().map(|lane| lane.acked_bytes).sum()
    }

    fn settle(&mut self) {
        self.window = Window::Settling { until_acked: self.handed_bytes };
    }

    fn close_window(&mut self, now: Duration, acked: u64) {
        let next = Open { since: now, acked_before: acked, ..Open::default() };
        let Window::Open(open) = std::mem::replace(&mut self.window, Window::Open(next)) else {
            return;
        };
        let seconds = now.saturating_sub(open.since).as_secs_f64().max(1e-6);
        let wire_rate = (acked - open.acked_before) as f64 / seconds;
        let ratio = open.wire_bytes as f64 / open.raw_bytes.max(1) as f64;
        let rate = wire_rate / ratio.max(1e-6);
        self.arms[self.active].rate = Some((rate, now));
        if let Some(codec) = self.codec() {
            self.learn(codec, open.raw_bytes as f64, open.wire_bytes as f64, open.packing);
            let busy = (open.packing + open.sending).as_secs_f64().max(1e-9);
            let link_bound = open.sending.as_secs_f64() / busy > LINK_BOUND;
            // A link that was the limit carries as much as it is.
            let as_it_is = self.arms[0].rate.map_or(0.0, |(rate, _)| rate);
            if link_bound && wire_rate > as_it_is * 0.8 {
                self.arms[0].rate = Some((wire_rate.max(as_it_is * 0.9), now));
            }
        }
        self.decide(now, rate);
    }

    fn decide(&mut self, now: Duration, rate: f64) {
        if let Some(trial) = self.trial.take() {
            let needed = if self.active == 0 { GAIN_BACK } else { GAIN_KEEP };
            if rate < trial.rate * needed {
                return self.lost(now, trial, rate);
            }
            self.arms[self.active].lost = 0;
            self.reason = format!("{} against {} before", mib(rate), mib(trial.rate));
        }
        if now < self.held_until {
            return;
        }
        let best = (0..self.arms.len())
            .filter(|&arm| arm != self.active && now >= self.arms[arm].retry_at)
            .filter_map(|arm| Some((arm, self.expected(arm, now)?)))
            .max_by(|a, b| a.1.total_cmp(&b.1));
        let Some((arm, expected)) = best else {
            return self.explain();
        };
        let needed = if arm == 0 { GAIN_BACK } else { GAIN_TRY };
        if expected > rate * needed {
            let from = self.active;
            let reason = match expected.is_finite() {
                true => format!("trying: {} expected against {}", mib(expected), mib(rate)),
                false => format!("trying the link against {} packed", mib(rate)),
            };
            self.switch(arm, reason);
            self.trial = Some(Trial { from, rate });
        } else {
            self.explain();
        }
    }

    /// Why nothing is packed, as long as nothing is.
    fn explain(&mut self) {
        if self.active != 0 || self.arms.len() == 1 {
            return;
        }
        let ratios = self.arms[1..].iter().filter_map(|arm| arm.ratio);
        let best = ratios.fold(f64::INFINITY, f64::min);
        let tried = self.arms[1..].iter().any(|arm| arm.lost > 0);
        self.reason = match self.arms[0].rate {
            _ if best.is_infinite() => "no sample was taken yet".into(),
            _ if best > RATIO_USELESS => "the memory does not pack".into(),
            Some((rate, _)) if !tried => {
                format!("packing can't keep up with {}", mib(rate))
            }
            _ => return,
        };
    }

    fn lost(&mut self, now: Duration, trial: Trial, rate: f64) {
        let arm = &mut self.arms[self.active];
        arm.retry_at = now + (RETRY * (1 << arm.lost.min(5))).min(RETRY_MAX);
        arm.lost += 1;
        let what = arm.codec.map_or("as it is".to_owned(), |codec| codec.to_string());
        let reason = format!("tried {what}: {} against {}", mib(rate), mib(trial.rate));
        self.switch(trial.from, reason);
    }

    /// Memory bytes a second by this arm: measured, or else computed from samples.
    fn expected(&self, index: usize, now: Duration) -> Option<f64> {
        let arm = &self.arms[index];
        match (arm.rate, arm.codec) {
            (Some((rate, at)), _) if now.saturating_sub(at) < BELIEVED => Some(rate),
            // Long ago, and the lanes have not waited for the link since: nobody knows.
            (Some(_), None) => Some(f64::INFINITY),
            (None, None) => None,
            (_, Some(_)) => {
                let (link, _) = self.arms[0].rate?;
                let ratio = arm.ratio.filter(|ratio| *ratio < RATIO_USELESS)?;
                let ns = arm.ns_per_byte + ratio * SEND_NS_PER_BYTE;
                Some((link / ratio).min(self.workers * 1e9 / ns))
            }
        }
    }

    fn learn(&mut self, codec: Codec, raw: f64, packed: f64, took: Duration) {
        let Some(arm) = self.arms.iter_mut().find(|arm| arm.codec == Some(codec)) else { return };
        if raw <= 0.0 {
            return;
        }
        let (ratio, ns) = (packed / raw, took.as_nanos() as f64 / raw);
        match arm.ratio {
            None => (arm.ratio, arm.ns_per_byte) = (Some(ratio), ns),
            Some(before) => {
                arm.ratio = Some(before + (ratio - before) * WEIGHT);
                arm.ns_per_byte += (ns - arm.ns_per_byte) * WEIGHT;
            }
        }
    }

    fn switch(&mut self, to: usize, reason: String) {
        tracing::debug!(codec = ?self.arms[to].codec, reason, "packing");
        self.active = to;
        self.switches += 1;
        self.reason = reason;
        self.trial = None;
        self.settle();
    }
}

fn mib(rate: f64) -> String {
    format!("{:.0} MiB/s", rate / f64::from(1 << 20))
}

#[cfg(test)]
mod tests {
    use super::*;

    const CODECS: [Codec; 2] = [Codec::Lz4, Codec::Zstd { level: 1 }];
    const BATCH: u64 = 1 << 20;

    /// Two lanes over one link, in virtual time: a buffer before the link, and what each codec does.
    struct World {
        governor: Governor,
        now: f64,
        /// When each lane is free again.
        lanes: [f64; 2],
        /// When the link has sent everything it was given.
        link_free: f64,
        link: f64,
        /// Ratio and seconds a byte of LZ4 and zstd.
        codecs: [(f64, f64); 2],
        given: [Vec<(f64, u64)>; 2],
        sampling: f64,
        need_cpu: bool,
    }

    impl World {
        fn new(link_mib: f64, lz4: (f64, f64), zstd: (f64, f64)) -> Self {
            let mib = f64::from(1 << 20);
            let per_byte = |(ratio, rate): (f64, f64)| (ratio, 1.0 / (rate * mib));
            Self {
                governor: Governor::new(&CODECS, 2, 2),
                now: 0.0,
                lanes: [0.0; 2],
                link_free: 0.0,
                link: link_mib * mib,
                codecs: [per_byte(lz4), per_byte(zstd)],
                given: [Vec::new(), Vec::new()],
                sampling: 0.0,
                need_cpu: false,
            }
        }

        fn codec(&self, codec: Codec) -> (f64, f64) {
            self.codecs[CODECS.iter().position(|&c| c == codec).unwrap()]
        }

        /// Moves memory for so long; MiB a second.
        fn run(&mut self, seconds: f64) -> f64 {
            let (begin, mut moved) = (self.now, 0);
            while self.now < begin + seconds {
                let lane = if self.lanes[0] <= self.lanes[1] { 0 } else { 1 };
                self.now = self.lanes[lane].max(self.now);
                self.step(lane);
                moved += BATCH;
            }
            moved as f64 / f64::from(1 << 20) / (self.now - begin)
        }

        fn step(&mut self, lane: usize) {
            let time = Duration::from_secs_f64;
            let start = self.now;
            let mut at = start;
            self.governor.guests_need_cpu(time(at), self.need_cpu);
            if let Some(codec) = self.governor.sample_due(time(at)) {
                let (ratio, cost) = self.codec(codec);
                let raw = 128 << 10;
                at += raw as f64 * cost;
                self.sampling += raw as f64 * cost;
                let packed = (raw as f64 * ratio) as usize;
                self.governor.sampled(time(at), codec, raw, packed, time(raw as f64 * cost));
            }
            let (ratio, cost) = self.governor.codec().map_or((1.0, 0.0), |c| self.codec(c));
            let wire = (BATCH as f64 * ratio) as u64 + 4096;
            let packing = BATCH as f64 * cost;
            at += packing;
            // The kernel takes it when its buffer has room: 1 MiB ahead of the link.
            let copied = at + wire as f64 * SEND_NS_PER_BYTE / 1e9;
            self.link_free = self.link_free.max(at) + wire as f64 / self.link;
            let taken = copied.max(self.link_free - f64::from(1 << 20) / self.link);
            self.given[lane].push((self.link_free, wire));
            let acked = self.given[lane].iter().filter(|(done, _)| *done <= taken);
            let acked_bytes = Some(acked.map(|(_, bytes)| bytes).sum());
            self.lanes[lane] = taken;
            let (packing, sending) = (time(packing), time(taken - at));
            let sent = Sent { raw_bytes: BATCH, wire_bytes: wire, packing, sending, acked_bytes };
            self.governor.sent(time(taken), lane, sent);
        }
    }

    #[test]
    fn a_slow_link_and_memory_that_packs_is_packed_soon() {
        // 1 Gbit/s and 3 to 1.
        let mut world = World::new(118.0, (0.34, 500.0), (0.33, 300.0));
        let rate = world.run(3.0);
        assert!(world.governor.codec().is_some(), "{:?}", world.governor.verdict());
        assert!(rate > 118.0 * 2.4, "{rate}");
    }

    #[test]
    fn the_better_codec_is_found() {
        let mut world = World::new(30.0, (0.5, 500.0), (0.25, 250.0));
        let rate = world.run(10.0);
        assert_eq!(world.governor.codec(), Some(Codec::Zstd { level: 1 }));
        assert!(rate > 90.0, "{rate}");
    }

    #[test]
    fn memory_that_does_not_pack_costs_no_more_than_samples() {
        for link in [118.0, 1180.0, 4000.0] {
            let mut world = World::new(link, (1.0, 2000.0), (1.0, 800.0));
            let mut off = World::new(link, (1.0, 2000.0), (1.0, 800.0));
            off.governor = Governor::new(&[], 2, 2);
            let (rate, off) = (world.run(10.0), off.run(10.0));
            assert_eq!((world.governor.codec(), world.governor.switches), (None, 0));
            assert!(rate > off * 0.98, "{rate} of {off}");
            assert!(world.governor.verdict().reason.contains("does not pack"));
        }
    }

    #[test]
    fn a_link_faster_than_the_codec_is_left_alone() {
        let mut world = World::new(3000.0, (0.34, 500.0), (0.3, 300.0));
        let rate = world.run(5.0);
        assert_eq!(world.governor.codec(), None);
        assert!(rate > 3000.0 * 0.97, "{rate}");
        let reason = world.governor.verdict().reason;
        assert!(reason.contains("keep up"), "{reason}");
    }

    #[test]
    fn what_only_samples_well_is_given_up_and_tried_less_and_less() {
        // The samples are of another kind than the memory: use is far slower than promised.
        let mut world = World::new(500.0, (0.3, 1000.0), (0.3, 900.0));
        let rates = [0; 8].map(|_| {
            let mut moved = 0.0;
            for _ in 0..40 {
                moved += world.run(0.05);
                // What packing costs in use.
                let in_use = world.governor.codec().is_some();
                let cost = 1.0 / ((if in_use { 100.0 } else { 1000.0 }) * f64::from(1 << 20));
                world.codecs = [(0.3, cost), (0.3, cost)];
            }
            moved / 40.0
        });
        assert!(rates[5..].iter().all(|rate| *rate > 450.0), "{rates:?}");
        assert!(world.governor.switches < 30, "{}", world.governor.switches);
    }

    #[test]
    fn a_link_that_becomes_fast_is_noticed_while_packing() {
        let mut world = World::new(118.0, (0.34, 400.0), (0.33, 300.0));
        world.run(3.0);
        assert!(world.governor.codec().is_some());
        world.link = 2500.0 * f64::from(1 << 20);
        world.run(12.0);
        let rate = world.run(5.0);
        assert!(rate > 1700.0, "{rate} {:?}", world.governor.verdict());
    }

    #[test]
    fn guests_that_need_the_processor_come_first() {
        let mut world = World::new(118.0, (0.34, 500.0), (0.33, 300.0));
        world.run(2.0);
        assert!(world.governor.codec().is_some());
        world.need_cpu = true;
        world.run(1.0);
        assert_eq!(world.governor.codec(), None);
        assert!(world.governor.verdict().reason.contains("guests"));
        world.need_cpu = false;
        world.run(6.0);
        assert!(world.governor.codec().is_some(), "{:?}", world.governor.verdict());
    }
}
