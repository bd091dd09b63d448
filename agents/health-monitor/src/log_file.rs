//! The log as a file: JSON lines, rotated by size.
//!
//! A thread writes it, so that a disk that is slow, full or gone holds nobody up: lines that cannot be
//! written are dropped, counted, and told of when it works again. Each line is written whole or not at all,
//! also where the disk fills up in the middle of one.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use tracing::warn;
use tracing_appender::non_blocking::{ErrorCounter, NonBlocking, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::fmt::writer::OptionalWriter;

/// Lines that wait for the disk at most: a minute of a bad night.
const LINES_MAX: usize = 2048;

/// Where log lines go to the file; to nowhere until it is opened. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct LogFile(Arc<OnceLock<NonBlocking>>);

impl LogFile {
    /// Begins to write, after what is there already. A file that cannot be opened is tried again with each
    /// line. What waits is written when the guard is dropped, if that is soon.
    pub fn open(&self, path: &Path, bytes_max: u64, files_max: u32) -> WorkerGuard {
        let dropped = Arc::new(OnceLock::new());
        let rotated = Rotated {
            path: path.to_owned(),
            bytes_max,
            files_max,
            open: None,
            lost: 0,
            dropped: Arc::clone(&dropped),
            dropped_before: 0,
        };
        let builder = NonBlockingBuilder::default().lossy(true).thread_name("log-file");
        let (writer, guard) = builder.buffered_lines_limit(LINES_MAX).finish(rotated);
        dropped.set(writer.error_counter()).ok();
        self.0.set(writer).ok();
        guard
    }
}

impl<'a> MakeWriter<'a> for LogFile {
    type Writer = OptionalWriter<NonBlocking>;

    fn make_writer(&'a self) -> Self::Writer {
        self.0.get().map_or_else(OptionalWriter::none, |it| OptionalWriter::some(it.clone()))
    }
}

/// The file, and those it was before: `name`, `name.1` … the oldest last.
#[derive(Debug)]
struct Rotated {
    path: PathBuf,
    bytes_max: u64,
    /// How many there may be, with the one that is written.
    files_max: u32,
    open: Option<Open>,
    /// Lines that could not be written since one could.
    lost: u64,
    /// Lines that nobody had time for, and of how many of them was told.
    dropped: Arc<OnceLock<ErrorCounter>>,
    dropped_before: usize,
}

#[derive(Debug)]
struct Open {
    file: File,
    bytes: u64,
}

impl Rotated {
    /// Writes a line, whole or not at all.
    fn append(&mut self, line: &[u8]) -> io::Result<()> {
        let added = line.len() as u64;
        let is_full = self.opened()?.bytes.saturating_add(added) > self.bytes_max;
        if is_full && self.opened()?.bytes > 0 {
            self.rotate()?;
        }
        let Open { file, bytes } = self.opened()?;
        match file.write_all(line) {
            Ok(()) => {
                *bytes += added;
                Ok(())
            }
            Err(error) => {
                // On a full disk the beginning of it may be there.
                file.set_len(*bytes).ok();
                self.open = None;
                Err(error)
            }
        }
    }

    /// The file. One that was removed or replaced, as by `logrotate`, is opened anew.
    fn opened(&mut self) -> io::Result<&mut Open> {
        let id = |it: &fs::Metadata| (it.dev(), it.ino());
        let there = fs::metadata(&self.path).ok();
        let is_ours = |it: &Open| {
            let ours = it.file.metadata().ok();
            ours.zip(there.as_ref()).is_some_and(|(ours, there)| id(&ours) == id(there))
        };
        let kept = self.open.take().filter(is_ours);
        let open = match kept {
            Some(mut open) => {
                // Emptied by somebody, perhaps: lines are appended wherever its end is.
                open.bytes = there.map_or(open.bytes, |it| it.len());
                open
            }
            None => open(&self.path)?,
        };
        Ok(self.open.insert(open))
    }

    /// `name.3` becomes `name.4` and so on; the last one goes.
    fn rotate(&mut self) -> io::Result<()> {
        self.open = None;
        let numbered = |number: u32| {
            let mut name = self.path.clone().into_os_string();
            if number > 0 {
                name.push(format!(".{number}"));
            }
            PathBuf::from(name)
        };
        if self.files_max < 2 {
            return fs::remove_file(&self.path);
        }
        for number in (0..self.files_max - 1).rev() {
            if let Err(error) = fs::rename(numbered(number), numbered(number + 1))
                && error.kind() != io::ErrorKind::NotFound
            {
                return Err(error);
            }
        }
        Ok(())
    }

    /// Tells of what was lost. What is told here is a line of the log too, and waits behind the others.
    fn tell(&mut self, written: io::Result<()>) {
        let path = self.path.display();
        if let Err(error) = written {
            if self.lost == 0 {
                warn!(%path, %error, "log file cannot be written");
            }
            self.lost += 1;
            return;
        }
        let dropped = self.dropped.get().map_or(0, ErrorCounter::dropped_lines);
        let slow = dropped - std::mem::replace(&mut self.dropped_before, dropped);
        let lost = std::mem::take(&mut self.lost).saturating_add(slow as u64);
        if lost > 0 {
            warn!(%path, lost, "log file lost lines and is written again");
        }
    }
}

/// Opens a file at its end, which is that of a line: one that was torn, as by a power cut, is ended.
fn open(path: &Path) -> io::Result<Open> {
    let mut file = OpenOptions::new().create(true).append(true).read(true).open(path)?;
    let mut bytes = file.metadata()?.len();
    if bytes > 0 {
        let mut last = [0];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut last, bytes - 1)?;
        if last != *b"\n" {
            file.write_all(b"\n")?;
            bytes += 1;
        }
    }
    Ok(Open { file, bytes })
}

impl Write for Rotated {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let written = self.append(line);
        self.tell(written);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use tempfile::TempDir;

    use super::*;

    fn rotated(path: &Path, bytes_max: u64, files_max: u32) -> Rotated {
        let (path, dropped) = (path.to_owned(), Arc::default());
        Rotated { path, bytes_max, files_max, open: None, lost: 0, dropped, dropped_before: 0 }
    }

    fn say(to: &mut Rotated, lines: &[&str]) {
        for line in lines {
            to.write_all(format!("{line}\n").as_bytes()).unwrap();
        }
    }

    fn files(directory: &TempDir) -> BTreeMap<String, String> {
        let entries = fs::read_dir(directory.path()).unwrap().map(Result::unwrap);
        let named = |it: fs::DirEntry| {
            let text = fs::read_to_string(it.path()).unwrap().replace('\n', "|");
            (it.file_name().into_string().unwrap(), text)
        };
        entries.map(named).collect()
    }

    fn expected(files: &[(&str, &str)]) -> BTreeMap<String, String> {
        files.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect()
    }

    #[test]
    fn a_file_that_is_full_moves_on_and_the_oldest_goes() {
        let directory = TempDir::new().unwrap();
        let mut log = rotated(&directory.path().join("log"), 6, 3);
        say(&mut log, &["a", "b", "c"]);
        assert_eq!(files(&directory), expected(&[("log", "a|b|c|")]));
        say(&mut log, &["d", "e"]);
        assert_eq!(files(&directory), expected(&[("log", "d|e|"), ("log.1", "a|b|c|")]));
        say(&mut log, &["longer than a file", "f", "g"]);
        let all = [("log", "f|g|"), ("log.1", "longer than a file|"), ("log.2", "d|e|")];
        assert_eq!(files(&directory), expected(&all));

        let directory = TempDir::new().unwrap();
        let mut log = rotated(&directory.path().join("log"), 6, 1);
        say(&mut log, &["a", "b", "c", "d"]);
        assert_eq!(files(&directory), expected(&[("log", "d|")]));
    }

    #[test]
    fn a_new_start_goes_on_at_the_end_of_a_line() {
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("log");
        fs::write(&path, "whole\ntor").unwrap();
        say(&mut rotated(&path, 100, 3), &["a"]);
        say(&mut rotated(&path, 100, 3), &["b"]);
        assert_eq!(files(&directory), expected(&[("log", "whole|tor|a|b|")]));
    }

    #[test]
    fn a_file_that_was_removed_moved_or_emptied_is_opened_anew() {
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("log");
        let mut log = rotated(&path, 8, 3);
        say(&mut log, &["a"]);
        fs::remove_file(&path).unwrap();
        say(&mut log, &["b"]);
        assert_eq!(files(&directory), expected(&[("log", "b|")]));
        fs::rename(&path, directory.path().join("moved")).unwrap();
        say(&mut log, &["c", "d", "e", "f"]);
        assert_eq!(files(&directory), expected(&[("log", "c|d|e|f|"), ("moved", "b|")]));
        File::create(&path).unwrap();
        say(&mut log, &["g"]);
        assert_eq!(files(&directory), expected(&[("log", "g|"), ("moved", "b|")]));
        assert_eq!(log.lost, 0);
    }

    #[test]
    fn what_cannot_be_written_is_counted_until_something_can() {
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("later/log");
        let mut log = rotated(&path, 100, 3);
        say(&mut log, &["a", "b"]);
        assert_eq!(log.lost, 2);
        fs::create_dir(directory.path().join("later")).unwrap();
        say(&mut log, &["c"]);
        assert_eq!((log.lost, fs::read_to_string(&path).unwrap()), (0, "c\n".to_owned()));
    }
}
