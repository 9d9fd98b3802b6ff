// SPDX-License-Identifier: GPL-2.0
//! Scenarios `selftests` and `selftests-all`: the kernel's own tests of network drivers, unmodified.
//!
//! They want a second machine to talk to. Here that is a second NIC, in a network namespace of the
//! guest: on the host's side its tap is bridged with the first one's, so all traffic goes through
//! the host and both NICs.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::time::Duration;

use clap::builder::PossibleValuesParser;
use regex::Regex;

use super::ending::account_for;
use super::guest::{Boot, Guest, Nic, COMMAND};
use super::tap::Tap;
use super::{ensure, Context, Drivers, Measurements, Result};

/// Where the archive has them.
const FOLDER: &str = "/usr/src/linux/tools/testing/selftests/drivers/net";
/// Where they find programs: ours stand before those of the image.
const PATH: &str = "/usr/local/bin:/usr/bin";
/// The namespace of the remote end.
const REMOTE: &str = "remote";
/// What the measurements of this scenario begin with.
const QUICK: &str = "selftests.";
const ALL: &str = "selftests-all.";

/// A file of tests, or some cases of one.
struct Part {
    name: &'static str,
    file: &'static str,
    deadline: Duration,
    /// Arguments of the test, none for all cases.
    cases: &'static str,
    /// The same for the short run, if it is in there.
    quick: Option<&'static str>,
    /// LRO has to be off, which the test does not see to.
    without_lro: bool,
}

const fn part(
    name: &'static str,
    seconds: u64,
    cases: &'static str,
    quick: Option<&'static str>,
) -> Part {
    // What is after the name of a file tells which cases these are.
    let file = match name.as_bytes() {
        [b'g', b'r', b'o', b'-', ..] => "gro",
        _ => name,
    };
    Part {
        name,
        file,
        deadline: Duration::from_secs(seconds),
        cases,
        quick,
        without_lro: matches!(name.as_bytes(), b"xdp"),
    }
}

const PARTS: &[Part] = &[
    part("queues", 200, "", Some("")),
    part("stats", 300, "", Some("-T procfs_downup_hammer")),
    part("napi_id", 200, "", Some("")),
    part("napi_threaded", 200, "", Some("")),
    part("hds", 200, "", Some("")),
    part("ring_reconfig", 400, "", Some("-t channels")),
    part("netpoll_basic", 300, "", None),
    part("ping", 1200, "", Some("-t test_default_v4")),
    part(
        "xdp",
        1200,
        "",
        Some("-t test_xdp_native_pass_sb -t test_xdp_native_drop_sb"),
    ),
    part(
        "gro-sw",
        1200,
        "-t 'test.sw_*'",
        Some("-t test.sw_ipv4_data_same -t test.sw_ipv4_tcp_seq"),
    ),
    part("gro-hw", 600, "-t 'test.hw_*'", None),
    part("gro-lro", 1200, "-t 'test.lro_*'", None),
    part("gro-capacity", 1200, "-t 'test_gro_capacity.*'", None),
];

/// The names of the parts, for the command line.
pub fn parts() -> PossibleValuesParser {
    PARTS
        .iter()
        .map(|part| part.name)
        .collect::<Vec<_>>()
        .into()
}

/// What became of a case; a better one is greater.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Verdict {
    Failed,
    Skipped,
    Expected,
    Passed,
}

impl Verdict {
    const ALL: [Self; 4] = [Self::Failed, Self::Skipped, Self::Expected, Self::Passed];

    fn word(self) -> &'static str {
        match self {
            Self::Failed => "fail",
            Self::Skipped => "skip",
            Self::Expected => "xfail",
            Self::Passed => "pass",
        }
    }

    /// For comparing: what is skipped for one reason or another is all the same.
    fn rank(self) -> u8 {
        match self {
            Self::Failed => 0,
            Self::Skipped | Self::Expected => 1,
            Self::Passed => 2,
        }
    }
}

/// What becomes of cases that do not pass. With any other result the scenario fails.
struct Known {
    /// A regular expression for their names.
    cases: &'static str,
    /// With the stock drivers; one of several where chance decides.
    c: &'static [Verdict],
    /// With ours.
    rust: &'static [Verdict],
    why: &'static str,
}

const PASS: &[Verdict] = &[Verdict::Passed];
const SKIP: &[Verdict] = &[Verdict::Skipped];
const XFAIL: &[Verdict] = &[Verdict::Expected];
const FAIL: &[Verdict] = &[Verdict::Failed];
const CHANCE: &[Verdict] = &[Verdict::Passed, Verdict::Failed];

const fn known(
    cases: &'static str,
    c: &'static [Verdict],
    rust: &'static [Verdict],
    why: &'static str,
) -> Known {
    Known {
        cases,
        c,
        rust,
        why,
    }
}

/// The first one that is about a case counts.
const KNOWN: &[Known] = &[
    known(
        r"queues\.addremove_queues",
        FAIL,
        PASS,
        "with one channel the stock driver keeps two queues",
    ),
    known(
        r"stats\.check_(pause|fec|fec_hist)",
        SKIP,
        SKIP,
        "the NIC has neither pause frames nor FEC",
    ),
    known(
        r"stats\.(pkt_byte_sum|qstat_by_ifindex|check_down)",
        SKIP,
        PASS,
        "the stock driver has no counters of queues",
    ),
    known(
        r"stats\.procfs_downup_hammer",
        CHANCE,
        PASS,
        "the stock driver's counters begin anew with another number of channels, which the test may miss",
    ),
    known(
        r"napi_threaded\.(change_num_queues|enable_dev_threaded_disable_napi_threaded)",
        FAIL,
        PASS,
        "the stock driver's NAPI instances get other ids with another number of channels",
    ),
    known(
        r"hds\..*",
        SKIP,
        SKIP,
        "the NIC does not split headers from data",
    ),
    known(
        r"ring_reconfig\.ringparam",
        FAIL,
        FAIL,
        "for too few sections both drivers take the least number, and do not refuse",
    ),
    known(
        r"ring_reconfig\.reconfig_tx_stall",
        XFAIL,
        PASS,
        "without byte limits nothing is left to the queueing discipline",
    ),
    known(
        r"netpoll_basic\.test_netpoll",
        &[Verdict::Passed, Verdict::Expected],
        &[Verdict::Passed, Verdict::Expected],
        "whether a queue is full while the kernel's log is sent is chance",
    ),
    known(
        r"ping\.test_xdp_native_mb",
        SKIP,
        SKIP,
        "an XDP frame has one page",
    ),
    known(
        r"ping\.test_xdp_offload",
        SKIP,
        SKIP,
        "the NIC runs no programs",
    ),
    known(
        r"xdp\.test_xdp_native_((pass|drop|tx)_mb|adjst_.*)",
        FAIL,
        FAIL,
        "an XDP frame has one page, so the test's MTU of 9000 is refused",
    ),
    known(
        r"xdp\.test_xdp_native_update_mb_to_sb",
        SKIP,
        SKIP,
        "an XDP frame has one page",
    ),
    known(
        r"xdp\.test_xdp_native_qstats\..*",
        FAIL,
        CHANCE,
        "the stock driver has no counters of queues; a busy machine loses some of 1000 datagrams",
    ),
    known(
        r"gro\.test\.sw_pppoev[46]_data_(same|lrg_sml|lrg_1byte|burst)",
        FAIL,
        FAIL,
        "the kernel, of Debian for clouds, has no PPPoE",
    ),
    known(
        r"gro\.test\.sw_.*_large_(max|rem)",
        CHANCE,
        CHANCE,
        "all of 64 KB has to come within one poll; the machine is slow",
    ),
    known(
        r"gro\.test\.lro_.*_(data_(same|lrg_sml|lrg_1byte|burst)|flags_.*|tcp_(ts|opt)|ip_id_.*|ip_frag6|ip_v6ext_same|large_.*)",
        FAIL,
        FAIL,
        "the lab's host does not put frames together that come to it one by one",
    ),
    known(
        r"gro\.test\.hw_.*|gro\.test_gro_capacity\.hw_.*",
        XFAIL,
        XFAIL,
        "the NIC has no hardware GRO",
    ),
    known(
        r"gro\.test_gro_capacity\..*_8q",
        XFAIL,
        XFAIL,
        "there are two queues",
    ),
    known(
        r"gro\.test_gro_capacity\..*_isolated",
        XFAIL,
        XFAIL,
        "the NIC has no filters to steer flows",
    ),
];

/// What may become of a case, and why, if that is not to pass.
fn expected(case: &str, drivers: Drivers) -> (&'static [Verdict], &'static str) {
    let is_about = |known: &&Known| {
        let cases = Regex::new(&format!("^(?:{})$", known.cases));
        cases.expect("a valid expression").is_match(case)
    };
    match KNOWN.iter().find(is_about) {
        Some(known) => match drivers {
            Drivers::C => (known.c, known.why),
            Drivers::Rust => (known.rust, known.why),
        },
        None => (PASS, ""),
    }
}

/// What the drivers log when a test tries what they do not do.
const LOGGED: [&str; 2] = [
    "eth0: XDP: not support LRO",
    "eth0: XDP: mtu:9000 too large, buf_max:[0-9]+",
];

/// A case as its file reports it.
#[derive(Debug, PartialEq, Eq)]
struct Case {
    name: String,
    verdict: Verdict,
    reason: String,
}

pub fn run(context: &mut Context<'_>) -> Result<()> {
    run_files(context, false)
}

/// The same with every case.
pub fn run_all(context: &mut Context<'_>) -> Result<()> {
    run_files(context, true)
}

fn run_files(context: &mut Context<'_>, all: bool) -> Result<()> {
    let archive = context.options.selftests.clone();
    let archive = archive
        .ok_or("no archive with the kernel's selftests (--selftests; scripts/lab.sh makes one)")?;
    let chosen = &context.options.selftest;
    let parts: Vec<_> = PARTS
        .iter()
        .filter(|part| chosen.is_empty() || chosen.iter().any(|name| name == part.name))
        .filter_map(|part| {
            let cases = if all { Some(part.cases) } else { part.quick };
            cases.map(|cases| (part, cases))
        })
        .collect();
    ensure(!parts.is_empty(), || {
        format!("{} is only in selftests-all", chosen.join(", "))
    })?;
    let guest = context.boot(&Boot {
        cpus: 2,
        overlay: Some(archive),
        ..Boot::new(vec![Nic::new(0), Nic::on_lan(1, 0)])
    })?;
    if context.check("the remote end answers through the host", || set_up(&guest)) {
        for (part, arguments) in parts {
            let mut cases = Vec::new();
            let which = match arguments {
                "" => "all cases",
                some => some,
            };
            let title = format!("part {}: {}.py, {which}", part.name, part.file);
            context.check(&title, || {
                cases = run_part(&guest, part, arguments)?;
                judge(&cases, guest.drivers())
            });
            context.check(
                &format!("part {}: nothing else is logged", part.name),
                || account_for(&guest, &LOGGED).map(drop),
            );
            for case in &cases {
                if case.verdict != Verdict::Passed {
                    let word = case.verdict.word();
                    let (_, why) = expected(&case.name, context.drivers);
                    context.note(&format!("{}: {word}: {} ({why})", case.name, case.reason));
                }
                context.measure(&case.name, case.verdict as u64);
            }
        }
    }
    context.finish(guest)
}

/// Makes the remote end, and says where it is.
fn set_up(guest: &Guest) -> Result<()> {
    let (local, remote) = (&guest.nics[0], &guest.nics[1]);
    let (v4, v6) = (local.guest_v4(), local.guest_v6());
    let (remote_v4, remote_v6) = ("10.0.0.3", "fd00:0::3");
    guest.sh(&format!(
        "depmod -a && modprobe configfs && mount -t configfs configfs /sys/kernel/config && \
         echo 1 >/proc/sys/net/ipv6/conf/all/keep_addr_on_down && \
         ip netns add {REMOTE} && ip link set {name} netns {REMOTE} && \
         ip -n {REMOTE} link set lo up && ip -n {REMOTE} link set {name} up && \
         ip -n {REMOTE} address add {remote_v4}/24 dev {name} && \
         ip -n {REMOTE} address add {remote_v6}/64 dev {name} nodad",
        name = remote.name()
    ))?;
    let config = format!(
        "NETIF={}\nLOCAL_V4={v4}\nREMOTE_V4={remote_v4}\nLOCAL_V6={v6}\nREMOTE_V6={remote_v6}\n\
         REMOTE_TYPE=netns\nREMOTE_ARGS={REMOTE}\n",
        local.name()
    );
    guest.sh(&format!("printf '%s' '{config}' >{FOLDER}/net.config"))?;
    guest.sh(&format!(
        "ping -c 3 -i 0.2 -w 10 {remote_v4} && ping -c 3 -i 0.2 -w 10 {remote_v6}"
    ))?;
    Ok(())
}

/// Runs a part to its end, or to its deadline.
fn run_part(guest: &Guest, part: &Part, arguments: &str) -> Result<Vec<Case>> {
    let (name, file) = (part.name, part.file);
    let seconds = part.deadline.as_secs();
    // The first signal lets the test clean up.
    let command =
        format!("cd {FOLDER} && export PATH={PATH} && timeout -k 20 {seconds} python3 {file}.py {arguments} 2>&1");
    let device = guest.nics[0].name();
    if part.without_lro {
        guest.sh(&format!("ethtool -K {device} lro off"))?;
    }
    let exit = guest.exit(&command, part.deadline + COMMAND)?;
    if part.without_lro {
        guest.sh(&format!("ethtool -K {device} lro on"))?;
    }
    let text = exit.stdout;
    fs::write(guest.folder.join(format!("{name}.txt")), &text)?;
    let (cases, planned) = parse(&text);
    ensure(cases.len() == planned && planned > 0, || {
        format!(
            "{} of {planned} cases reported, exit code {}\n{}",
            cases.len(),
            exit.code,
            last(&text)
        )
    })?;
    let failed = cases.iter().any(|case| case.verdict == Verdict::Failed);
    ensure(exit.code == i32::from(failed), || {
        format!("exit code {}\n{}", exit.code, last(&text))
    })?;
    Ok(cases)
}

fn last(text: &str) -> String {
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(12)..].join("\n")
}

/// The cases in what a test has printed, and how many it has announced.
fn parse(text: &str) -> (Vec<Case>, usize) {
    let result =
        Regex::new(r"^(not )?ok [0-9]+ ([^ ]+)(?: # ?(.*))?$").expect("a valid expression");
    let mut planned = 0;
    let mut cases = Vec::new();
    let mut comments = Vec::new();
    for line in text.lines() {
        if let Some(count) = line.strip_prefix("1..") {
            planned = count.parse().unwrap_or(0);
        } else if let Some(found) = result.captures(line) {
            let comment = found.get(3).map_or("", |comment| comment.as_str());
            let (verdict, reason) = if found.get(1).is_some() {
                (Verdict::Failed, explain(&comments))
            } else if let Some(reason) = comment.strip_prefix("SKIP") {
                (Verdict::Skipped, reason.trim().to_owned())
            } else if let Some(reason) = comment.strip_prefix("XFAIL") {
                (Verdict::Expected, reason.trim().to_owned())
            } else {
                (Verdict::Passed, String::new())
            };
            cases.push(Case {
                name: found[2].to_owned(),
                verdict,
                reason,
            });
            comments.clear();
        } else if let Some(comment) = line.strip_prefix('#') {
            comments.push(comment.trim());
        }
    }
    (cases, planned)
}

/// The lines that say most about a failure.
fn explain(comments: &[&str]) -> String {
    let telling = |line: &&&str| {
        line.starts_with("Check failed")
            || line.starts_with("Expected exception")
            || line.contains("STDERR:")
    };
    let mut lines: Vec<&str> = comments.iter().filter(telling).copied().collect();
    if lines.is_empty() {
        lines.extend(
            comments
                .iter()
                .rev()
                .find(|line| !line.trim_end_matches('|').is_empty()),
        );
    }
    lines.truncate(3);
    lines.join("; ")
}

/// Fails if something else became of a case than what is known.
fn judge(cases: &[Case], drivers: Drivers) -> Result<()> {
    let mut other = Vec::new();
    for case in cases {
        let (expected, _) = expected(&case.name, drivers);
        if !expected.contains(&case.verdict) {
            let words: Vec<_> = expected.iter().map(|verdict| verdict.word()).collect();
            other.push(format!(
                "{}: {}, not {}: {}",
                case.name,
                case.verdict.word(),
                words.join(" or "),
                case.reason
            ));
        }
    }
    ensure(other.is_empty(), || other.join("\n"))
}

/// Both driver sets' verdicts by case.
type Table = BTreeMap<String, [Option<Verdict>; 2]>;

fn table(measurements: &Measurements, prefix: &str) -> Table {
    let mut table = Table::new();
    for ((rust, name), &value) in measurements {
        let verdict = Verdict::ALL.get(value as usize).copied();
        if let Some(case) = name.strip_prefix(prefix) {
            table.entry(case.to_owned()).or_default()[usize::from(*rust)] = verdict;
        }
    }
    table
}

/// Ours must pass what the stock drivers pass. Writes the table, too.
pub fn compare(tap: &mut Tap, measurements: &Measurements, output: &Path) {
    for prefix in [QUICK, ALL] {
        let table = table(measurements, prefix);
        if table.is_empty() {
            continue;
        }
        let mut worse = Vec::new();
        let word = |verdict: Option<Verdict>| verdict.map_or("-", Verdict::word);
        let mut text = format!("{:60} {:6} {:6}\n", "case", "C", "Rust");
        for (case, &[c, rust]) in &table {
            let _ = writeln!(text, "{case:60} {:6} {:6}", word(c), word(rust));
            let rank = |verdict: Option<Verdict>| verdict.map_or(0, Verdict::rank);
            // What chance decides cannot be compared.
            let certain = expected(case, Drivers::Rust).0.len() == 1;
            if rank(rust) < rank(c) && (certain || rust.is_none()) {
                worse.push(format!(
                    "{case}: {} with C, {} with Rust",
                    word(c),
                    word(rust)
                ));
            }
        }
        let count = |set: usize, verdict| {
            let of = table.values().filter(|row| row[set] == Some(verdict));
            of.count()
        };
        for (set, name) in ["C", "Rust"].into_iter().enumerate() {
            let counts = Verdict::ALL.map(|v| format!("{} {}", count(set, v), v.word()));
            let _ = writeln!(text, "{name}: {}", counts.join(", "));
        }
        tap.note(&text);
        let path = output.join(format!("{}txt", prefix));
        if let Err(error) = fs::write(&path, &text) {
            worse.push(format!("{}: {error}", path.display()));
        }
        tap.check(
            &format!(
                "{}: ours passes each of the {} cases that the stock driver passes",
                prefix.trim_end_matches('.'),
                count(0, Verdict::Passed)
            ),
            match worse.is_empty() {
                true => Ok(()),
                false => Err(worse.join("\n")),
            },
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "TAP version 13
1..5
# Reached min
ok 1 ring.one
# Exception| Traceback (most recent call last):
# Exception|   STDERR: no such thing
# Exception|
not ok 2 ring.two
ok 3 ring.three # SKIP not there
ok 4 ring.four # XFAIL as expected
# Totals: pass:1
";

    #[test]
    fn reports_are_parsed() {
        let (cases, planned) = parse(OUTPUT);
        assert_eq!(planned, 5);
        let got: Vec<_> = cases
            .iter()
            .map(|case| (case.name.as_str(), case.verdict, case.reason.as_str()))
            .collect();
        assert_eq!(
            got,
            [
                ("ring.one", Verdict::Passed, ""),
                (
                    "ring.two",
                    Verdict::Failed,
                    "Exception|   STDERR: no such thing"
                ),
                ("ring.three", Verdict::Skipped, "not there"),
                ("ring.four", Verdict::Expected, "as expected"),
            ]
        );
        assert!(judge(&cases, Drivers::C).is_err());
    }

    #[test]
    fn what_is_known_is_no_failure() {
        let case = |verdict| Case {
            name: "queues.addremove_queues".to_owned(),
            verdict,
            reason: String::new(),
        };
        for (drivers, known, other) in [
            (Drivers::C, Verdict::Failed, Verdict::Passed),
            (Drivers::Rust, Verdict::Passed, Verdict::Failed),
        ] {
            assert!(judge(&[case(known)], drivers).is_ok());
            assert!(judge(&[case(other)], drivers).is_err());
        }
    }

    #[test]
    fn what_is_known_is_about_whole_names() {
        assert_eq!(expected("hds.get_hds", Drivers::C).0, SKIP);
        assert_eq!(expected("other.hds.get_hds", Drivers::C).0, PASS);
        for known in KNOWN {
            assert!(Regex::new(known.cases).is_ok(), "{}", known.cases);
        }
    }

    #[test]
    fn what_is_missing_is_worse() {
        let mut measurements = Measurements::new();
        measurements.insert((false, "selftests.a.b".into()), Verdict::Passed as u64);
        let folder = std::env::temp_dir();
        let mut tap = Tap::new(Box::new(std::io::sink()));
        compare(&mut tap, &measurements, &folder);
        assert_eq!(tap.failures(), 1);
        measurements.insert((true, "selftests.a.b".into()), Verdict::Passed as u64);
        compare(&mut tap, &measurements, &folder);
        assert_eq!(tap.failures(), 1);
        let _ = fs::remove_file(folder.join("selftests.txt"));
    }
}
