// SPDX-License-Identifier: GPL-2.0
//! Requests and responses of one byte over TCP: how long one takes.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use serde::{Deserialize, Serialize};

/// A response that takes longer is lost.
const LOST: Duration = Duration::from_secs(10);

/// Options of the one who answers.
#[derive(Debug, Clone, Args)]
pub struct ServeOptions {
    /// Where to listen
    #[arg(long)]
    pub bind: SocketAddr,
}

/// Options of the one who asks.
#[derive(Debug, Clone, Args)]
pub struct Options {
    /// Where it is answered
    #[arg(long)]
    pub to: SocketAddr,
    /// Requests that count
    #[arg(long, default_value_t = 1000)]
    pub count: usize,
    /// Requests before that, which do not
    #[arg(long, default_value_t = 50)]
    pub warm_up: usize,
}

/// How long it took from a request to its response.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Report {
    /// Half of them took less.
    pub median_ns: u64,
    /// 99 of 100 took less.
    pub p99_ns: u64,
    /// Requests in a second.
    pub per_second: f64,
}

/// Answers every byte, on any number of connections, for ever.
pub fn serve(options: &ServeOptions) -> io::Result<()> {
    let listener = TcpListener::bind(options.bind)?;
    eprintln!("ready");
    loop {
        let (mut stream, _) = listener.accept()?;
        stream.set_nodelay(true)?;
        thread::spawn(move || {
            let mut byte = [0];
            // The end of a connection, whatever the reason, is the end of its requests.
            while stream.read_exact(&mut byte).is_ok() && stream.write_all(&byte).is_ok() {}
        });
    }
}

/// Asks.
pub fn ask(options: &Options) -> io::Result<Report> {
    let mut stream = TcpStream::connect(options.to)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(LOST))?;
    let mut byte = [0];
    let mut times = Vec::with_capacity(options.count);
    let mut start = Instant::now();
    for index in 0..options.warm_up + options.count {
        if index == options.warm_up {
            start = Instant::now();
        }
        let asked = Instant::now();
        stream.write_all(&byte)?;
        stream.read_exact(&mut byte)?;
        if index >= options.warm_up {
            times.push(asked.elapsed().as_nanos() as u64);
        }
    }
    let per_second = times.len() as f64 / start.elapsed().as_secs_f64();
    times.sort_unstable();
    Ok(Report {
        median_ns: percentile(&times, 50),
        p99_ns: percentile(&times, 99),
        per_second,
    })
}

/// The value that so many percent of sorted values do not exceed.
fn percentile(sorted: &[u64], percent: usize) -> u64 {
    let index = (sorted.len() * percent).div_ceil(100);
    sorted
        .get(index.saturating_sub(1))
        .copied()
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles() {
        let sorted: Vec<_> = (1..=200).collect();
        assert_eq!(
            (percentile(&sorted, 50), percentile(&sorted, 99)),
            (100, 198)
        );
        assert_eq!((percentile(&[7], 50), percentile(&[7], 99)), (7, 7));
        assert_eq!(percentile(&[], 50), 0);
    }

    #[test]
    fn every_request_is_answered() {
        let bind = "127.0.0.1:17391".parse().expect("an address");
        thread::spawn(move || serve(&ServeOptions { bind }));
        let options = Options {
            to: bind,
            count: 20,
            warm_up: 2,
        };
        let report = (0..100)
            .find_map(|_| {
                thread::sleep(Duration::from_millis(20));
                ask(&options).ok()
            })
            .expect("answers");
        assert!(
            0 < report.median_ns && report.median_ns <= report.p99_ns && report.per_second > 0.0
        );
    }
}
