//! Who is let in, and what each side is told when nobody is: the door of a target and the callers
//! that come to it, on loopback, in one process.
#![forbid(unsafe_code)]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use pageferry_ctl::agent::acceptor::{Acceptor, Arrival};
use pageferry_ctl::agent::failure::chain;
use pageferry_ctl::agent::link::{Link, LinkError};
use pageferry_ctl::agent::record::{self, Record, Records, Role};
use pageferry_ctl::agent::recovery;
use pageferry_ctl::agent::tls::{Caller, Door, Security};
use pageferry_ctl::pki::authority::{self, Validity};
use pageferry_ctl::pki::credentials;
use pageferry_ctl::pki::layout::{self, End, Layout};
use pageferry_datapath::control::{Message, Recover, Recovered, Word};
use pageferry_datapath::ids::SessionId;
use pageferry_datapath::recover;
use pageferry_uring::handshake;
use pageferry_uring::limits::GREETING_WAIT_MAX;
use rustls::crypto::ring::default_provider;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, Connection, RootCertStore};

type Outcome = Result<(), Box<dyn std::error::Error>>;

const SOON: Duration = Duration::from_secs(20);
const DAY: Duration = Duration::from_secs(24 * 3600);

/// A folder with authorities and what they have issued.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Result<Self, Box<dyn std::error::Error>> {
        Ok(Self(tempfile::tempdir()?))
    }

    /// A host's directory, signed by an authority of this name.
    fn host(&self, authority: &str, name: &str) -> Result<PathBuf, Box<dyn std::error::Error>> {
        self.host_valid(authority, name, Validity::days(1))
    }

    fn host_valid(
        &self,
        authority: &str,
        name: &str,
        validity: Validity,
    ) -> Result<PathBuf, Box<dyn std::error::Error>> {
        let from = self.0.path().join(authority);
        if !from.exists() {
            authority::init(&from, authority, 1)?;
        }
        let out = from.join(name);
        authority::issue(&from, &out, &[name.to_owned()], validity)?;
        Ok(out)
    }
}

fn target(dir: &Path) -> Result<Acceptor, Box<dyn std::error::Error>> {
    Ok(Acceptor::listen("127.0.0.1:0", |at| Door::of(at, Some(dir), false))?)
}

fn caller(dir: &Path) -> Caller {
    Caller { tls_dir: Some(dir.into()), ..Caller::default() }
}

fn call(acceptor: &Acceptor, caller: &Caller) -> Result<Link, LinkError> {
    let link = Link::connect(&acceptor.address().to_string(), caller, SOON)?;
    // A connection is announced with the first that it says.
    link.send(&Message::Prepare)?;
    Ok(link)
}

/// The link of the next control connection.
fn admitted(acceptor: &Acceptor) -> Result<Link, Box<dyn std::error::Error>> {
    match acceptor.arrivals().recv_timeout(SOON)? {
        Arrival::Control { link, .. } => Ok(link),
        other => Err(format!("expected a control connection: {other:?}").into()),
    }
}

/// Why the next connection was not let in.
fn turned_away(acceptor: &Acceptor) -> Result<String, Box<dyn std::error::Error>> {
    match acceptor.arrivals().recv_timeout(SOON)? {
        Arrival::Stranger { reason, .. } => Ok(reason),
        other => Err(format!("expected nobody: {other:?}").into()),
    }
}

/// What a failed call says, and what it advises.
fn said(error: &LinkError) -> String {
    let hint = match error {
        LinkError::Tls(error) => error.hint(),
        _ => None,
    };
    format!("{}; hint: {}", chain("", error), hint.unwrap_or_default())
}

#[track_caller]
fn assert_says(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "{word:?} is not in {text:?}");
    }
}

#[test]
fn both_sides_learn_who_the_other_is() -> Outcome {
    let place = Place::new()?;
    let acceptor = target(&place.host("ca", "127.0.0.1")?)?;
    let source = call(&acceptor, &caller(&place.host("ca", "host-a")?))?;
    let target = admitted(&acceptor)?;
    for (link, name) in [(&source, "127.0.0.1"), (&target, "host-a")] {
        let Security::Tls { peer, suite, .. } = link.security() else {
            return Err(format!("{:?}", link.security()).into());
        };
        assert_eq!(peer, name);
        assert!(suite.starts_with("TLS13_"), "{suite}");
        assert_eq!(link.security().warning("source"), None);
    }
    Ok(())
}

#[test]
fn messages_pass_both_ways_at_once_however_large() -> Outcome {
    let place = Place::new()?;
    let dir = place.host("ca", "127.0.0.1")?;
    let acceptor = target(&dir)?;
    let source = call(&acceptor, &caller(&dir))?;
    let target = admitted(&acceptor)?;
    // What either side says first is short.
    target.send(&Message::Prepare)?;
    assert_eq!(source.receive(SOON)?, Message::Prepare);
    let chunk = Message::DeviceState((0..200_000u32).map(|n| n as u8).collect());
    let (to_heard, heard) = crossbeam_channel::unbounded();
    for link in [&source, &target] {
        let to_heard = to_heard.clone();
        link.read_with(move |heard| to_heard.send(heard.map(|(it, _)| it)).unwrap_or(()));
    }
    std::thread::scope(|scope| {
        for link in [&source, &target] {
            let chunk = &chunk;
            scope.spawn(move || (0..100).for_each(|_| link.send(chunk).unwrap()));
        }
    });
    for _ in 0..200 {
        assert_eq!(heard.recv_timeout(SOON)??, chunk);
    }
    source.finish();
    assert!(matches!(heard.recv_timeout(SOON)?, Err(LinkError::Closed)));
    source.close();
    Ok(())
}

#[test]
fn another_ca_is_not_believed_by_the_source() -> Outcome {
    let place = Place::new()?;
    let acceptor = target(&place.host("one", "127.0.0.1")?)?;
    let error = call(&acceptor, &caller(&place.host("two", "host-a")?)).expect_err("refused");
    assert_says(&said(&error), &["target's certificate is signed by another CA", "ca-cert.pem"]);
    assert_says(&turned_away(&acceptor)?, &["source does not believe our certificate", "hint: "]);
    Ok(())
}

#[test]
fn another_ca_is_not_believed_by_the_target() -> Outcome {
    let place = Place::new()?;
    let acceptor = target(&place.host("one", "127.0.0.1")?)?;
    // Believes the right authority, and shows what another has signed.
    let mixed = place.host("two", "host-a")?;
    std::fs::copy(place.0.path().join("one/ca-cert.pem"), mixed.join("ca-cert.pem"))?;
    let error = call(&acceptor, &caller(&mixed)).expect_err("refused");
    assert_says(&said(&error), &["target does not believe our certificate", "ca-cert.pem"]);
    assert_says(&turned_away(&acceptor)?, &["source's certificate is signed by another CA"]);
    Ok(())
}

#[test]
fn the_target_s_name_has_to_be_the_one_that_was_called() -> Outcome {
    let place = Place::new()?;
    let dir = place.host("ca", "host-b")?;
    let acceptor = target(&dir)?;
    let error = call(&acceptor, &caller(&dir)).expect_err("refused");
    assert_says(&said(&error), &["not for 127.0.0.1, but for host-b", "--tls-hostname"]);
    turned_away(&acceptor)?;
    let knowing = Caller { hostname: Some("host-b".into()), ..caller(&dir) };
    let link = call(&acceptor, &knowing)?;
    assert!(matches!(link.security(), Security::Tls { peer, .. } if peer == "host-b"));
    Ok(())
}

#[test]
fn what_has_expired_is_not_shown() -> Outcome {
    let place = Place::new()?;
    let now = SystemTime::now();
    let past = Validity { from: now - 3 * DAY, until: now - DAY };
    let expired = place.host_valid("ca", "127.0.0.1", past)?;
    let error = target(&expired).expect_err("a target says so before it listens");
    assert_says(&error.to_string(), &["certificates of this host"]);
    let acceptor = target(&place.host("ca", "127.0.0.2")?)?;
    let error = call(&acceptor, &caller(&expired)).expect_err("refused");
    assert_says(&said(&error), &["client-cert.pem is valid from", "pageferry pki issue"]);
    Ok(())
}

/// A client as somebody else would write it.
fn foreign(
    acceptor: &Acceptor,
    believes: &Path,
    shows: Option<&Path>,
) -> Result<(), handshake::HandshakeError> {
    let mut roots = RootCertStore::empty();
    let of = Layout::of(believes);
    roots.add(layout::certificates(&of.authority()).unwrap().remove(0)).unwrap();
    let config = ClientConfig::builder_with_provider(Arc::new(default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots);
    let mut config = match shows.map(Layout::of) {
        None => config.with_no_client_auth(),
        Some(own) => {
            let chain = layout::certificates(&own.certificate(End::Client)).unwrap();
            let key = layout::private_key(&own.key(End::Client)).unwrap();
            config.with_client_auth_cert(chain, key).unwrap()
        }
    };
    config.alpn_protocols = vec![credentials::CONTROL.to_vec()];
    let name = ServerName::try_from("127.0.0.1").unwrap();
    let mut tls = Connection::from(ClientConnection::new(Arc::new(config), name).unwrap());
    let stream = TcpStream::connect(acceptor.address()).unwrap();
    let deadline = Instant::now() + SOON;
    handshake::complete(&stream, &mut tls, deadline)?;
    handshake::read_exact(&stream, &mut tls, &mut [0; 4], deadline)
}

#[test]
fn an_expired_certificate_is_not_believed() -> Outcome {
    let place = Place::new()?;
    let good = place.host("ca", "127.0.0.1")?;
    let now = SystemTime::now();
    let past = Validity { from: now - 3 * DAY, until: now - DAY };
    let expired = place.host_valid("ca", "host-a", past)?;
    let acceptor = target(&good)?;
    foreign(&acceptor, &good, Some(&expired)).expect_err("refused");
    assert_says(&turned_away(&acceptor)?, &["source's certificate has expired", "clocks"]);
    foreign(&acceptor, &good, Some(&good))?;
    // It was let in, and left without a word.
    assert_says(&turned_away(&acceptor)?, &["the peer closed the control connection"]);
    Ok(())
}

#[test]
fn without_a_certificate_nobody_comes_in() -> Outcome {
    let place = Place::new()?;
    let good = place.host("ca", "127.0.0.1")?;
    let acceptor = target(&good)?;
    foreign(&acceptor, &good, None).expect_err("refused");
    assert_says(&turned_away(&acceptor)?, &["source shows no certificate", "pki issue"]);
    Ok(())
}

#[test]
fn a_target_s_certificate_does_not_open_another_target() -> Outcome {
    let place = Place::new()?;
    let good = place.host("ca", "127.0.0.1")?;
    // What a stolen target could do: show its own certificate as a source's.
    let stolen = place.host("ca", "host-b")?;
    for (from, to) in [("server-cert.pem", "client-cert.pem"), ("server-key.pem", "client-key.pem")]
    {
        std::fs::copy(stolen.join(from), stolen.join(to))?;
    }
    let acceptor = target(&good)?;
    call(&acceptor, &caller(&stolen)).expect_err("refused");
    assert_says(&turned_away(&acceptor)?, &["not for who connects"]);
    Ok(())
}

#[test]
fn a_source_without_tls_is_told_what_is_missing() -> Outcome {
    let place = Place::new()?;
    let acceptor = target(&place.host("ca", "127.0.0.1")?)?;
    let link = call(&acceptor, &Caller { insecure: true, ..Caller::default() })?;
    assert!(link.security().warning("source").is_some_and(|text| text.contains("--insecure")));
    let (to_heard, heard) = crossbeam_channel::unbounded();
    link.read_with(move |heard| to_heard.send(heard.map(|(it, _)| it)).unwrap_or(()));
    link.send(&Message::Verify)?;
    let Message::Abort(abort) = heard.recv_timeout(SOON)?? else { return Err("no abort".into()) };
    assert_says(&abort.text, &["only connections with certificates"]);
    assert_says(&abort.hint.unwrap_or_default(), &["pageferry pki issue", "--insecure"]);
    assert_says(&turned_away(&acceptor)?, &["speaks no TLS"]);
    Ok(())
}

#[test]
fn a_target_without_tls_is_told_apart_from_a_broken_one() -> Outcome {
    let place = Place::new()?;
    let acceptor = Acceptor::listen("127.0.0.1:0", |at| Door::of(at, None, true))?;
    assert_eq!(acceptor.door().plain(), Some(&Security::Insecure));
    let error = call(&acceptor, &caller(&place.host("ca", "host-a")?)).expect_err("refused");
    assert_says(&said(&error), &["target takes no TLS", "--tls-dir", "--insecure"]);
    assert_says(&turned_away(&acceptor)?, &["it speaks TLS"]);
    Ok(())
}

#[test]
fn only_loopback_is_plain_without_being_told_so() -> Outcome {
    let here: SocketAddr = "127.0.0.1:1".parse()?;
    let there: SocketAddr = "192.0.2.1:1".parse()?;
    assert!(matches!(Door::of(here, None, false)?, Door::Plain(Security::Loopback)));
    assert!(matches!(Door::of(there, None, true)?, Door::Plain(Security::Insecure)));
    let empty = tempfile::tempdir()?;
    let error = Door::of(there, Some(empty.path()), false).expect_err("nothing is in there");
    assert_says(&error.hint().unwrap_or_default(), &["pageferry pki init", "pki issue"]);
    Ok(())
}

#[test]
fn a_slow_handshake_ends_and_holds_nobody_up() -> Outcome {
    let place = Place::new()?;
    let dir = place.host("ca", "127.0.0.1")?;
    let acceptor = target(&dir)?;
    let mut slow = TcpStream::connect(acceptor.address())?;
    let began = Instant::now();
    // A handshake record of 512 bytes, of which one comes every now and then.
    slow.write_all(&[22, 3, 1, 2, 0, 1])?;
    let dripping = std::thread::spawn(move || {
        while slow.write_all(&[0]).is_ok() && began.elapsed() < 3 * GREETING_WAIT_MAX {
            std::thread::sleep(Duration::from_millis(50));
        }
        let _closed_by_the_target = slow.read(&mut [0; 16]);
        began.elapsed()
    });
    let _link = call(&acceptor, &caller(&dir))?;
    admitted(&acceptor)?;
    assert!(began.elapsed() < GREETING_WAIT_MAX, "another caller had to wait");
    assert_says(&turned_away(&acceptor)?, &["did not complete the TLS handshake"]);
    let ended = dripping.join().expect("no panic");
    assert!(ended < 2 * GREETING_WAIT_MAX, "it ended after {ended:?}");
    Ok(())
}

#[test]
fn a_record_is_not_acted_on_at_the_word_of_another_host() -> Outcome {
    let place = Place::new()?;
    let acceptor = target(&place.host("ca", "127.0.0.1")?)?;
    let (source, other) = (place.host("ca", "host-a")?, place.host("ca", "host-b")?);
    let state = place.0.path().join("state");
    let session = SessionId(7);
    let path = record::path_of(&state, session, Role::Target);
    let asks = |dir: &Path, word| -> Result<_, Box<dyn std::error::Error>> {
        let link = Link::connect(&acceptor.address().to_string(), &caller(dir), SOON)?;
        link.send(&Message::Recover(Recover { session, word }))?;
        let Arrival::Control { link: theirs, first } = acceptor.arrivals().recv_timeout(SOON)?
        else {
            return Err("expected a control connection".into());
        };
        let Message::Recover(ask) = *first else { return Err(format!("{first:?}").into()) };
        Ok((link, theirs, ask))
    };
    // A QEMU that is gone: what is recorded of it is all there is to change.
    let (_link, theirs, _) = asks(&source, Word::None)?;
    let mut attempt = Record::attempting(session, Role::Target, "a".into(), "/q".into(), i32::MAX);
    attempt.peer_identity = theirs.security().identity();
    drop(Records::begin(&state, attempt)?);
    let before = std::fs::read(&path)?;
    for word in [Word::HandedOver, Word::Aborted, Word::None] {
        let (link, theirs, ask) = asks(&other, word)?;
        assert_eq!(recovery::answer(&state, &theirs, ask), None, "{word:?}");
        let Message::Abort(abort) = link.receive(SOON)? else { return Err("no abort".into()) };
        assert_says(&abort.text, &["host-b is not the source of session"]);
        recovery::forget(&state, session, theirs.security());
        assert!(std::fs::read(&path)? == before, "{word:?} changed the record");
    }
    // It was in nobody's way. A renewed certificate is the same host's.
    let renewed = place.0.path().join("renewed");
    authority::issue(&place.0.path().join("ca"), &renewed, &["host-a".into()], Validity::days(2))?;
    let (link, theirs, ask) = asks(&renewed, Word::Aborted)?;
    let source = std::thread::spawn(move || {
        let answer = link.receive(SOON);
        recovery::settle(&link, session);
        answer
    });
    assert_eq!(recovery::answer(&state, &theirs, ask), Some(recover::End::TheOthers));
    let answer = source.join().expect("no panic")?;
    assert_eq!(answer, Message::Recovered(Recovered { word: Word::Aborted }));
    assert!(!path.exists(), "both sides know");
    Ok(())
}
