//! How far a run is: counted by the run, shown on a terminal or read by `/status`.

use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tokio::sync::watch;

/// How often the terminal is drawn.
const DRAW_EVERY: Duration = Duration::from_millis(200);

/// The counters of one run. Clones share them.
#[derive(Clone, Debug)]
pub struct Progress {
    counters: Arc<Counters>,
    stage: Arc<watch::Sender<&'static str>>,
}

#[derive(Debug, Default)]
struct Counters {
    done_bytes: AtomicU64,
    total_bytes: AtomicU64,
}

impl Default for Progress {
    fn default() -> Self {
        Self { counters: Arc::default(), stage: Arc::new(watch::Sender::new("starting")) }
    }
}

impl Progress {
    /// A new stage begins. `total_bytes` is an estimate; 0 if there is none.
    pub fn begin(&self, stage: &'static str, total_bytes: u64) {
        self.counters.done_bytes.store(0, Ordering::Relaxed);
        self.counters.total_bytes.store(total_bytes, Ordering::Relaxed);
        self.stage.send_replace(stage);
        tracing::debug!(stage, "stage began");
    }

    /// So many more bytes are done.
    pub fn add(&self, bytes: u64) {
        self.counters.done_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// The stage, the bytes done in it, and the estimate of their total.
    pub fn now(&self) -> (&'static str, u64, u64) {
        let Counters { done_bytes, total_bytes } = &*self.counters;
        let (done, total) =
            (done_bytes.load(Ordering::Relaxed), total_bytes.load(Ordering::Relaxed));
        (*self.stage.borrow(), done, total.max(done))
    }
}

/// Runs `work` and draws its progress on standard error while that is a terminal.
pub async fn drawn<T>(progress: &Progress, work: impl Future<Output = T>) -> T {
    if !std::io::stderr().is_terminal() {
        return work.await;
    }
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    // The templates are constants; one that did not parse would leave the default style.
    let style = |template| {
        ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
    };
    let measured = style("{msg:24} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta} left");
    let waiting = style("{spinner} {msg:24} {elapsed}");
    let mut shown = "";
    let mut tick = tokio::time::interval(DRAW_EVERY);
    let mut work = std::pin::pin!(work);
    loop {
        tokio::select! {
            result = &mut work => {
                bar.finish_and_clear();
                return result;
            }
            _ = tick.tick() => {
                let (stage, done, total) = progress.now();
                if stage != shown {
                    shown = stage;
                    bar.reset();
                    bar.set_message(stage);
                    bar.set_style(if total > 0 { measured.clone() } else { waiting.clone() });
                }
                bar.set_length(total);
                bar.set_position(done);
                bar.tick();
            }
        }
    }
}
