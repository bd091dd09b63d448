//! The store against every S3 server we can have, and against a directory: what each promises,
//! and that nothing is lost where a promise is missing.

use std::io;
use std::sync::{Arc, Mutex};

use axum::Router;
use bytes::Bytes;
use harness::{
    Effect, Fault, Operation, Refusal, S3Endpoint, S3Server, directory, garage_endpoint,
    moto_endpoint,
};
use shared::store::{ObjectStore, Put, StoreConfig, StoreError, StoreErrorKind};
use shared::telemetry::chain;
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::task::JoinSet;

/// The longest object that is read as a whole, in bytes.
const LIMIT: u64 = 12 << 20;

/// What a server does that others do not.
#[derive(Clone, Copy, Debug)]
struct Promises {
    /// A second put of a name is refused.
    write_once: bool,
    /// Unfinished uploads can be listed.
    unfinished: bool,
}

async fn open_s3(endpoint: &S3Endpoint, prefix: &str) -> (ObjectStore, TempDir) {
    let directory = directory();
    let section = endpoint.config(directory.path()).replace("[repository.s3]", "[s3]");
    let text = format!("prefix = \"{prefix}\"\n{section}");
    let config: StoreConfig = toml::from_str(&text).unwrap();
    (ObjectStore::open(&config).await.unwrap(), directory)
}

fn bytes(len: usize) -> Bytes {
    (0..len).map(|n| u8::try_from(n % 251).unwrap()).collect()
}

/// Everything the agent asks of a store.
async fn keeps_its_promises(store: &ObjectStore, promises: Promises) {
    assert_eq!(store.head("a/none").await.unwrap(), None);
    assert_eq!(store.get("a/none", LIMIT).await.unwrap_err().kind, StoreErrorKind::NotFound);
    assert!(store.list("a/", None, None).await.unwrap().is_empty());

    let content = bytes(100_000);
    assert_eq!(store.put("a/one", content.clone(), None).await.unwrap(), Put::Created);
    assert_eq!(store.get("a/one", LIMIT).await.unwrap(), content);
    assert_eq!(store.get_range("a/one", 10..20).await.unwrap(), content.slice(10..20));
    let beyond = store.get_range("a/one", 99_990..100_010).await.unwrap_err();
    assert_eq!(beyond.kind, StoreErrorKind::Corrupt, "{beyond}");
    let longer = store.get("a/one", 99_999).await.unwrap_err();
    assert_eq!(longer.kind, StoreErrorKind::Refused, "{longer}");
    assert!(chain(&longer).to_string().contains("100000 bytes, expected 99999"), "{longer:?}");
    let info = store.head("a/one").await.unwrap().unwrap();
    assert_eq!((info.key.as_str(), info.bytes), ("a/one", 100_000));

    // The same content again is the retry of a request whose answer was lost.
    assert_eq!(store.put("a/one", content.clone(), None).await.unwrap(), Put::Created);
    let other = store.put("a/one", bytes(5), None).await.unwrap();
    if promises.write_once {
        assert_eq!(other, Put::Exists);
        assert_eq!(store.get("a/one", LIMIT).await.unwrap(), content);
    }
    assert_eq!(store.put("a/empty", Bytes::new(), None).await.unwrap(), Put::Created);
    assert_eq!(store.get("a/empty", LIMIT).await.unwrap(), Bytes::new());

    for name in ["a/x/1", "a/x/2", "a/y/3", "b/4"] {
        store.put(name, bytes(10), None).await.unwrap();
    }
    let names = |listed: Vec<shared::store::ObjectInfo>| -> Vec<String> {
        listed.into_iter().map(|info| info.key).collect()
    };
    let all = names(store.list("a/", None, None).await.unwrap());
    assert_eq!(all, ["a/empty", "a/one", "a/x/1", "a/x/2", "a/y/3"]);
    assert_eq!(names(store.list("a/x", Some("a/x/1"), None).await.unwrap()), ["a/x/2"]);
    assert_eq!(names(store.list("a/", None, Some(2)).await.unwrap()), ["a/empty", "a/one"]);
    assert_eq!(store.list_folders("a/").await.unwrap(), ["x", "y"]);

    let part_bytes = 5 << 20;
    let upload = store.upload("a/large", part_bytes, None).await.unwrap();
    let whole = bytes(12 << 20);
    let second = upload.part(2, whole.slice(5 << 20..10 << 20)).await.unwrap();
    let first = upload.part(1, whole.slice(..5 << 20)).await.unwrap();
    assert_eq!(store.head("a/large").await.unwrap(), None, "an unfinished upload is visible");
    if promises.unfinished {
        let unfinished = store.unfinished("a/").await.unwrap();
        assert_eq!(unfinished.len(), 1, "{unfinished:?}");
        assert_eq!(unfinished[0].key, "a/large");
    }
    let third = upload.part(3, whole.slice(10 << 20..)).await.unwrap();
    upload.complete(vec![second, first, third]).await.unwrap();
    assert!(store.get("a/large", LIMIT).await.unwrap() == whole);
    let middle = store.get_range("a/large", (5 << 20) - 3..(5 << 20) + 3).await.unwrap();
    assert_eq!(middle, whole.slice((5 << 20) - 3..(5 << 20) + 3));

    let given_up = store.upload("a/given-up", part_bytes, None).await.unwrap();
    given_up.part(1, whole.slice(..5 << 20)).await.unwrap();
    given_up.abort().await.unwrap();
    assert_eq!(store.head("a/given-up").await.unwrap(), None);
    if promises.unfinished {
        assert_eq!(store.unfinished("a/").await.unwrap(), []);
    }

    store.delete("a/one").await.unwrap();
    store.delete("a/one").await.unwrap();
    assert_eq!(store.head("a/one").await.unwrap(), None);
}

#[tokio::test]
async fn a_directory_keeps_its_promises() {
    let directory = directory();
    let text = format!("[directory]\npath = \"{}\"\n", directory.path().display());
    let config: StoreConfig = toml::from_str(&text).unwrap();
    let store = ObjectStore::open(&config).await.unwrap();
    keeps_its_promises(&store, Promises { write_once: true, unfinished: true }).await;
}

#[tokio::test]
async fn a_directory_that_is_not_there_is_not_an_empty_one() {
    let directory = directory();
    let path = directory.path().join("not-mounted");
    let text = format!("[directory]\npath = \"{}\"\n", path.display());
    let config: StoreConfig = toml::from_str(&text).unwrap();
    let store = ObjectStore::open(&config).await.unwrap();
    let error = store.list("", None, None).await.unwrap_err();
    assert!(chain(&error).to_string().contains("does not exist"), "{error:?}");
    store.put("a", bytes(1), None).await.unwrap_err();
    assert!(!path.exists(), "the missing directory was made");
}

/// A mount that goes away leaves an empty directory, and brings the right one back.
#[tokio::test]
async fn another_directory_in_the_place_of_the_first_is_refused() {
    let directory = directory();
    let (path, away) = (directory.path().join("mount"), directory.path().join("away"));
    std::fs::create_dir(&path).unwrap();
    let text = format!("[directory]\npath = \"{}\"\n", path.display());
    let config: StoreConfig = toml::from_str(&text).unwrap();
    let store = ObjectStore::open(&config).await.unwrap().pinned().await.unwrap();
    store.put("a", bytes(1), None).await.unwrap();
    std::fs::rename(&path, &away).unwrap();
    std::fs::create_dir(&path).unwrap();
    let error = store.put("b", bytes(1), None).await.unwrap_err();
    assert!(chain(&error).to_string().contains("is it mounted?"), "{error:?}");
    store.list("", None, None).await.unwrap_err();
    assert_eq!(std::fs::read_dir(&path).unwrap().count(), 0);
    std::fs::remove_dir(&path).unwrap();
    std::fs::rename(&away, &path).unwrap();
    store.put("b", bytes(1), None).await.unwrap();
}

#[tokio::test]
async fn the_s3_server_of_the_tests_keeps_its_promises() {
    let server = S3Server::start().await;
    let (store, _directory) = open_s3(server.endpoint(), "some/prefix").await;
    keeps_its_promises(&store, Promises { write_once: true, unfinished: true }).await;
    assert!(server.bucket().keys("some/prefix/").len() > 4);
}

/// What is deleted while it is listed is there or not, but never a part of itself.
#[tokio::test]
async fn a_list_beside_deletions_tells_all_of_each_object() {
    let server = S3Server::start().await;
    let (store, _directory) = open_s3(server.endpoint(), "").await;
    let churn = async {
        for number in 0..60 {
            let keys: Vec<_> = (0..8).map(|it| format!("{number}/{it}")).collect();
            for key in &keys {
                store.put(key, bytes(1), None).await.unwrap();
            }
            store.delete_all(keys).await.unwrap();
        }
    };
    let lists = async {
        loop {
            store.list("", None, None).await.unwrap();
        }
    };
    tokio::select! {
        () = churn => {}
        () = lists => {}
    }
}

#[tokio::test]
async fn a_server_that_ignores_conditions_is_survived() {
    let server = S3Server::start().await;
    server.faults().ignore_conditions(true);
    let (store, _directory) = open_s3(server.endpoint(), "").await;
    keeps_its_promises(&store, Promises { write_once: false, unfinished: true }).await;
}

#[tokio::test]
async fn moto_keeps_its_promises() {
    if let Some(endpoint) = moto_endpoint() {
        let (store, _directory) = open_s3(&endpoint, "store-test").await;
        keeps_its_promises(&store, Promises { write_once: true, unfinished: true }).await;
    }
}

#[tokio::test]
async fn garage_keeps_its_promises_but_one() {
    if let Some(endpoint) = garage_endpoint() {
        let (store, _directory) = open_s3(&endpoint, "store-test").await;
        keeps_its_promises(&store, Promises { write_once: false, unfinished: true }).await;
    }
}

/// Some servers do not know the request that deletes many, or refuse it without a checksum.
#[tokio::test]
async fn a_store_that_cannot_delete_many_at_once_deletes_one_by_one() {
    let server = S3Server::start().await;
    let (store, _directory) = open_s3(server.endpoint(), "").await;
    let keys = |from: u32| (from..from + 20).map(|n| format!("many/{n}")).collect::<Vec<_>>();
    for (from, refusal) in [(0, Refusal::NotImplemented), (20, Refusal::AccessDenied)] {
        let many = Operation::DeleteObjects;
        let fault = server.faults().add(Fault::new(Effect::Refuse(refusal)).on(many));
        for key in keys(from) {
            store.put(&key, bytes(1), None).await.unwrap();
        }
        store.delete_all(keys(from)).await.unwrap();
        assert!(server.faults().hits(fault) > 0, "{refusal:?}: it was not even tried");
        assert!(store.list("many/", None, None).await.unwrap().is_empty(), "{refusal:?}");
        server.faults().clear();
    }
    // Nothing at all may be deleted.
    for key in keys(40) {
        store.put(&key, bytes(1), None).await.unwrap();
    }
    server.faults().object_lock(true);
    let denied = store.delete_all(keys(40)).await.unwrap_err();
    assert_eq!(denied.kind, StoreErrorKind::Denied, "{denied}");
    assert_eq!(store.list("many/", None, None).await.unwrap().len(), 20);
}

/// A store at a server that answers each request with the next of these, and with the last for ever.
async fn open_answering(
    answers: &[&str],
    attempts: u32,
) -> (ObjectStore, (TempDir, JoinSet<io::Result<()>>)) {
    let answers: Vec<String> = answers.iter().rev().map(ToString::to_string).collect();
    let answers = Arc::new(Mutex::new(answers));
    let router = Router::new().fallback(async move || {
        let mut left = answers.lock().unwrap();
        if left.len() == 1 { left[0].clone() } else { left.pop().unwrap() }
    });
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = S3Endpoint {
        url: format!("http://{}", listener.local_addr().unwrap()),
        bucket: "b".to_owned(),
        access_key_id: "id".to_owned(),
        secret_access_key: "secret".to_owned(),
    };
    let mut server = JoinSet::new();
    server.spawn(async move { axum::serve(listener, router).await });
    let directory = directory();
    let section = endpoint.config(directory.path()).replace("[repository.s3]", "[s3]");
    let config: StoreConfig = toml::from_str(&format!("{section}attempts = {attempts}\n")).unwrap();
    (ObjectStore::open(&config).await.unwrap(), (directory, server))
}

/// A list with that count of keys that says what follows, too.
fn list(announced: usize, more: &str) -> String {
    let object = |key| {
        let at = "<LastModified>2026-01-02T03:04:05Z</LastModified>";
        format!("<Contents><Key>{key}</Key>{at}<Size>1</Size></Contents>")
    };
    let folder = |name| format!("<CommonPrefixes><Prefix>{name}/</Prefix></CommonPrefixes>");
    let [a, b] = ["a", "b"].map(object);
    let [c, d] = ["c", "d"].map(folder);
    format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n\
         <ListBucketResult xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\"><Name>b</Name>\
         <KeyCount>{announced}</KeyCount><IsTruncated>{more}</IsTruncated>{a}{b}{c}{d}\
         </ListBucketResult>"
    )
}

/// The SDK takes a list that ends between two elements for one of fewer objects.
#[tokio::test]
async fn an_answer_that_is_cut_anywhere_is_none() {
    let whole = list(4, "false");
    let names = async |store: &ObjectStore| {
        let listed = store.list("", None, None).await?;
        Ok::<_, StoreError>(listed.into_iter().map(|it| it.key).collect::<Vec<_>>())
    };
    let (store, _directory) = open_answering(&[&whole], 1).await;
    assert_eq!(names(&store).await.unwrap(), ["a", "b"]);
    assert_eq!(store.list_folders("").await.unwrap(), ["c", "d"]);
    let cuts: Vec<&str> = (0..whole.len()).map(|end| &whole[..end]).collect();
    let (store, _directory) = open_answering(&cuts, 1).await;
    for cut in &cuts {
        let error = names(&store).await.expect_err(cut);
        assert_eq!(error.kind, StoreErrorKind::Unavailable, "{cut}: {error:?}");
    }
    let cut = &whole[..whole.find("<Key>b").unwrap() - "<Contents>".len()];
    let (store, _directory) = open_answering(&[cut], 1).await;
    let message = chain(&store.list_folders("").await.unwrap_err()).to_string();
    assert!(message.contains("the answer is cut short: "), "{message}");
    let uploads = "<ListMultipartUploadsResult><Upload><Key>k</Key></Upload>";
    let (store, _directory) = open_answering(&[uploads], 1).await;
    assert_eq!(store.unfinished("").await.unwrap_err().kind, StoreErrorKind::Unavailable);
    let (store, _directory) =
        open_answering(&["<DeleteResult><Error><Key>b</Key></Error>"], 1).await;
    let keys = ["a", "b"].map(str::to_owned).to_vec();
    assert_eq!(store.delete_all(keys).await.unwrap_err().kind, StoreErrorKind::Unavailable);

    let (store, _directory) = open_answering(&[cut, &whole], 2).await;
    assert_eq!(names(&store).await.unwrap(), ["a", "b"], "it is asked for again");
}

#[tokio::test]
async fn a_list_that_holds_less_than_it_says_is_none() {
    for (answer, expected) in [
        (list(5, "false"), "the list holds 4 of the 5 keys that it announces"),
        (list(4, "true"), "the list goes on, and does not say where"),
        ("<html><body>Sign in</body></html>".to_owned(), "is not one of S3: does a proxy answer"),
        (String::new(), "is not one of S3: does a proxy answer"),
    ] {
        let (store, _directory) = open_answering(&[&answer], 1).await;
        let listed = store.list("", None, None).await.unwrap_err();
        let folders = store.list_folders("").await.unwrap_err();
        for error in [listed, folders] {
            assert_eq!(error.kind, StoreErrorKind::Unavailable, "{error:?}");
            let message = chain(&error).to_string();
            assert!(message.contains(expected), "{message}");
        }
    }
    // Some servers do not count the folders, or nothing.
    for answer in [list(2, "false"), list(0, "false")] {
        let (store, _directory) = open_answering(&[&answer], 1).await;
        assert_eq!(store.list("", None, None).await.unwrap().len(), 2);
    }
}

/// Its age would be that of 1970, and what is old is deleted.
#[tokio::test]
async fn an_object_of_which_the_store_does_not_tell_all_is_none() {
    let whole = list(4, "false");
    let lacking =
        ["<Key>b</Key>", "<LastModified>2026-01-02T03:04:05Z</LastModified>", "<Size>1</Size>"];
    for part in lacking {
        let (store, _directory) = open_answering(&[&whole.replace(part, "")], 1).await;
        let error = store.list("", None, None).await.unwrap_err();
        let message = chain(&error).to_string();
        assert!(message.contains("does not tell the object's name, length and time"), "{message}");
    }
}

#[tokio::test]
async fn a_storage_class_reaches_the_store() {
    let server = S3Server::start().await;
    let (store, _directory) = open_s3(server.endpoint(), "").await;
    store.put("put", bytes(1), Some("STANDARD_IA")).await.unwrap();
    let upload = store.upload("upload", 5 << 20, Some("GLACIER_IR")).await.unwrap();
    let part = upload.part(1, bytes(9)).await.unwrap();
    upload.complete(vec![part]).await.unwrap();
    let class = |key| server.bucket().storage_class(key);
    assert_eq!(class("put").as_deref(), Some("STANDARD_IA"));
    assert_eq!(class("upload").as_deref(), Some("GLACIER_IR"));
}

#[tokio::test]
async fn wrong_credentials_and_a_missing_bucket_are_told_apart() {
    let server = S3Server::start().await;
    let mut wrong = server.endpoint().clone();
    wrong.secret_access_key = "not the secret".to_owned();
    let (store, _directory) = open_s3(&wrong, "").await;
    assert_eq!(store.get("x", LIMIT).await.unwrap_err().kind, StoreErrorKind::Denied);

    let mut missing = server.endpoint().clone();
    missing.bucket = "no-such-bucket".to_owned();
    let (store, _directory) = open_s3(&missing, "").await;
    let error = store.put("x", bytes(1), None).await.unwrap_err();
    assert_eq!(error.kind, StoreErrorKind::NotFound);
    assert!(chain(&error).to_string().contains("NoSuchBucket"), "{error:?}");
}
