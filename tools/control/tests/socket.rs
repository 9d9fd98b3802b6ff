// SPDX-License-Identifier: GPL-2.0

//! Client and server over a real socket, with a lab that only notes what it is asked for.

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    path::PathBuf,
    sync::{Arc, Mutex},
    time::Duration,
};

use lab_control::{
    Client, ClientError, Fault, Kind, Lab, LogPage, NicStatus, PciAction, Reply, Request, Server,
    Setting, Status, Target, VfStatus,
};

#[derive(Default)]
struct Recorder(Mutex<Vec<String>>);

impl Recorder {
    fn add(&self, what: String) -> Result<(), String> {
        self.0.lock().unwrap().push(what);
        Ok(())
    }
}

impl Lab for Recorder {
    fn add_vf(&self, nic: u32) -> Result<(), String> {
        self.add(format!("add {nic}"))
    }

    fn remove_vf(&self, nic: u32) -> Result<(), String> {
        self.add(format!("remove {nic}"))
    }

    fn set_vf_link(&self, nic: u32, up: bool) -> Result<(), String> {
        self.add(format!("vf-link {nic} {up}"))
    }

    fn reset_vf(&self, nic: u32) -> Result<(), String> {
        self.add(format!("reset-vf {nic}"))
    }

    fn set_association(&self, nic: u32, on: bool) -> Result<(), String> {
        self.add(format!("association {nic} {on}"))
    }

    fn eject(&self, nic: u32) -> Result<(), String> {
        Err(format!("NIC {nic} has no VF"))
    }

    fn rescind(&self, nic: u32, device: Target) -> Result<(), String> {
        self.add(format!("rescind {nic} {device:?}"))
    }

    fn offer(&self, nic: u32, device: Target) -> Result<(), String> {
        self.add(format!("offer {nic} {device:?}"))
    }

    fn set_nic_link(&self, nic: u32, up: bool) -> Result<(), String> {
        self.add(format!("nic-link {nic} {up}"))
    }

    fn change_network(&self, nic: u32) -> Result<(), String> {
        self.add(format!("change-network {nic}"))
    }

    fn set(&self, nic: u32, setting: Setting, value: Option<u32>) -> Result<(), String> {
        self.add(format!("set {nic} {setting:?} {value:?}"))
    }

    fn send(
        &self,
        nic: u32,
        kind: Kind,
        transaction: u64,
        messages: &[Vec<u8>],
    ) -> Result<(), String> {
        self.add(format!("send {nic} {kind:?} {transaction} {messages:x?}"))
    }

    fn fault(&self, nic: u32, fault: Fault, times: u32) -> Result<(), String> {
        self.add(format!("fault {nic} {fault:?} {times}"))
    }

    fn pci(&self, bus: u32, action: &PciAction) -> Result<Option<String>, String> {
        self.add(format!("pci {bus} {action:?}"))?;
        Ok(matches!(action, PciAction::Config { .. }).then(|| "00".into()))
    }

    fn note(&self, event: &str) {
        let word = event.split(' ').next().unwrap_or_default();
        self.0.lock().unwrap().push(word.to_owned());
    }

    fn run_at_peer(&self, nic: u32, command: &str) -> Result<String, String> {
        Ok(format!("{nic}: {command}"))
    }

    fn log(&self, since: u64, _max_lines: usize) -> LogPage {
        LogPage {
            lines: vec![format!("line {since}")],
            next: since + 1,
            dropped: 0,
        }
    }

    fn counters(&self) -> BTreeMap<String, u64> {
        BTreeMap::from([("vmbus.gpadls".into(), u64::MAX)])
    }

    fn status(&self) -> Status {
        let nic = |offered| NicStatus {
            vf: Some(VfStatus {
                offered,
                ..VfStatus::default()
            }),
            ..NicStatus::default()
        };
        Status {
            nics: vec![nic(false), nic(true), NicStatus::default(), nic(true)],
            ..Status::default()
        }
    }

    fn quit(&self) {
        self.0.lock().unwrap().push("quit".into());
    }
}

fn socket(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("lab-control-{}-{name}", std::process::id()))
}

#[test]
fn requests_reach_the_lab() {
    let path = socket("requests");
    let lab = Arc::new(Recorder::default());
    let server = Server::start(&path, lab.clone()).unwrap();
    let mut client = Client::connect(&path, Duration::ZERO).unwrap();

    for request in [
        Request::AddVf { nic: 1 },
        Request::RemoveVf { nic: 2 },
        Request::VfLink { nic: 0, up: false },
        Request::ResetVf { nic: 0 },
        Request::SetAssociation { nic: 0, on: true },
        Request::Rescind {
            nic: 0,
            device: Target::Vf,
        },
        Request::Offer {
            nic: 0,
            device: Target::Nic,
        },
        Request::NicLink { nic: 3, up: true },
        Request::ChangeNetwork { nic: 3 },
        Request::Set {
            nic: 2,
            setting: Setting::Rsc,
            value: Some(1),
        },
        Request::Send {
            nic: 1,
            kind: Kind::Rndis,
            transaction: 0,
            messages: vec!["00fF".into(), "".into()],
            times: 2,
        },
        Request::Pci {
            bus: 1,
            action: PciAction::Offer,
        },
        Request::Pci {
            bus: 0,
            action: PciAction::Eject { function: 3 },
        },
        Request::Service {
            nic: None,
            duration_ms: 1,
        },
        Request::Quit,
    ] {
        assert_eq!(client.request(&request).unwrap(), Reply::Done);
    }
    assert_eq!(
        *lab.0.lock().unwrap(),
        [
            "add 1",
            "remove 2",
            "vf-link 0 false",
            "reset-vf 0",
            "association 0 true",
            "rescind 0 Vf",
            "offer 0 Nic",
            "nic-link 3 true",
            "change-network 3",
            "set 2 Rsc Some(1)",
            "send 1 Rndis 0 [[0, ff], []]",
            "send 1 Rndis 0 [[0, ff], []]",
            "pci 1 Offer",
            "pci 0 Eject { function: 3 }",
            "SERVICE_BEGIN",
            "remove 1",
            "remove 3",
            "add 1",
            "add 3",
            "SERVICE_END",
            "quit"
        ]
    );

    assert_eq!(
        client.request(&Request::Counters).unwrap(),
        Reply::Counters(lab.counters())
    );
    assert_eq!(
        client.request(&Request::Log { since: 7 }).unwrap(),
        Reply::Log(lab.log(7, 1))
    );
    assert_eq!(
        client.request(&Request::Status).unwrap(),
        Reply::Status(lab.status())
    );
    assert_eq!(
        client
            .request(&Request::Peer {
                nic: 4,
                run: "ping".into()
            })
            .unwrap(),
        Reply::Output("4: ping".into())
    );
    assert_eq!(
        client
            .request(&Request::Pci {
                bus: 0,
                action: PciAction::Config { function: 0 }
            })
            .unwrap(),
        Reply::Output("00".into())
    );
    for (request, error) in [
        (Request::Eject { nic: 5 }, "NIC 5 has no VF"),
        (
            Request::Send {
                nic: 0,
                kind: Kind::Nvsp,
                transaction: 0,
                messages: vec!["0".into()],
                times: 1,
            },
            "a message is an even number of hexadecimal digits",
        ),
        (
            Request::Service {
                nic: Some(0),
                duration_ms: 1,
            },
            "NIC 0 has no VF now",
        ),
        (
            Request::Service {
                nic: None,
                duration_ms: 600_001,
            },
            "servicing takes at most 600 seconds",
        ),
    ] {
        match client.request(&request) {
            Err(ClientError::Refused(text)) => assert_eq!(text, error),
            other => panic!("{request:?}: {other:?}"),
        }
    }

    drop(server);
    assert!(!path.exists());
    assert!(Client::connect(&path, Duration::ZERO).is_err());
}

#[test]
fn bad_lines_get_an_error_and_the_connection_lives() {
    let path = socket("bad");
    let _server = Server::start(&path, Arc::new(Recorder::default())).unwrap();
    let mut stream = UnixStream::connect(&path).unwrap();
    let mut replies = BufReader::new(stream.try_clone().unwrap());
    for line in [
        "nonsense",
        "{}",
        "{\"command\":\"fly\"}",
        "{\"command\":\"add-vf\"}",
        "{\"command\":\"add-vf\",\"nic\":-1}",
        "\u{0}",
    ] {
        stream.write_all(line.as_bytes()).unwrap();
        stream.write_all(b"\n\n").unwrap();
        let mut reply = String::new();
        replies.read_line(&mut reply).unwrap();
        assert!(reply.starts_with("{\"error\":\"bad request"), "{reply}");
    }
    stream
        .write_all(b"{\"command\":\"add-vf\",\"nic\":1}\n")
        .unwrap();
    let mut reply = String::new();
    replies.read_line(&mut reply).unwrap();
    assert_eq!(reply, "{\"ok\":\"done\"}\n");

    // A line without end is refused at the limit.
    let long = vec![b' '; lab_control::MAX_REQUEST as usize + 1];
    stream.write_all(&long).unwrap();
    reply.clear();
    replies.read_line(&mut reply).unwrap();
    assert_eq!(reply, "{\"error\":\"request is too long\"}\n");
}

#[test]
fn a_socket_left_behind_is_replaced_and_one_in_use_is_not() {
    let path = socket("stale");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let _server = Server::start(&path, Arc::new(Recorder::default())).unwrap();
    assert!(Server::start(&path, Arc::new(Recorder::default())).is_err());
    assert!(Client::connect(&path, Duration::ZERO).is_ok());
}
