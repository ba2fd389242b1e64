//! First answers by idempotency key.
//!
//! A guest that lost its answer (its host end went away and came back) sends the request again.
//! Whoever repeats a key while the first request still runs waits for that one; whoever repeats it
//! later gets the remembered answer. A failure is forgotten, so that it can be tried again. The
//! mirror remembers keys as well, and for longer: forgetting one here is safe.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};

use blobcr_proto::v1::{CheckpointReply, SetMembership};
use tokio::sync::watch;
use tonic::Status;

use crate::limits::{ANSWERS_MAX, CHECKPOINTS_MAX};

type Outcome = Option<Result<CheckpointReply, Status>>;

struct Entry {
    set: Option<SetMembership>,
    outcome: watch::Receiver<Outcome>,
}

#[derive(Default)]
struct State {
    entries: HashMap<String, Entry>,
    /// Keys whose answer is known, oldest first; the others are running.
    finished: VecDeque<String>,
}

/// The answers of one VM.
#[derive(Clone, Default)]
pub(crate) struct Answers {
    state: Arc<Mutex<State>>,
}

/// What a key's holder has to do.
pub(crate) enum Claim {
    /// Run it, and tell the outcome by the ticket.
    First(Ticket, Answer),
    /// Somebody does or did.
    Repeated(Answer),
}

/// The duty to run a request. Dropped without an outcome, the key is free again.
pub(crate) struct Ticket {
    key: String,
    answers: Answers,
    outcome: watch::Sender<Outcome>,
}

/// An answer that is there or will be.
pub(crate) struct Answer(watch::Receiver<Outcome>);

impl Answers {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nothing panics while it holds this")
    }

    /// Takes a key, or finds who has it.
    ///
    /// # Errors
    /// When the key was used for another request, or too many requests run.
    pub(crate) fn claim(&self, key: &str, set: Option<&SetMembership>) -> Result<Claim, Status> {
        let mut state = self.lock();
        if let Some(entry) = state.entries.get(key) {
            if entry.set.as_ref() != set {
                return Err(Status::invalid_argument(format!(
                    "the idempotency key {key} was used for another request; choose a new one"
                )));
            }
            return Ok(Claim::Repeated(Answer(entry.outcome.clone())));
        }
        if state.entries.len() - state.finished.len() >= CHECKPOINTS_MAX {
            return Err(Status::resource_exhausted(format!(
                "{CHECKPOINTS_MAX} checkpoints of this VM are running; wait for one of them"
            )));
        }
        let (sender, outcome) = watch::channel(None);
        let answer = Answer(outcome.clone());
        state.entries.insert(key.to_owned(), Entry { set: set.cloned(), outcome });
        let ticket = Ticket { key: key.to_owned(), answers: self.clone(), outcome: sender };
        Ok(Claim::First(ticket, answer))
    }
}

impl Ticket {
    /// Tells the outcome to everybody who waits for it, and remembers it when it is an answer.
    pub(crate) fn finish(self, outcome: Result<CheckpointReply, Status>) {
        {
            let mut state = self.answers.lock();
            if outcome.is_ok() {
                state.finished.push_back(self.key.clone());
                if state.finished.len() > ANSWERS_MAX
                    && let Some(oldest) = state.finished.pop_front()
                {
                    state.entries.remove(&oldest);
                }
            } else {
                state.entries.remove(&self.key);
            }
        }
        self.outcome.send_replace(Some(outcome));
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let unfinished = self.outcome.borrow().is_none();
        if unfinished {
            self.answers.lock().entries.remove(&self.key);
        }
    }
}

impl Answer {
    /// Waits for the answer.
    pub(crate) async fn get(mut self) -> Result<CheckpointReply, Status> {
        match self.0.wait_for(Option::is_some).await {
            Ok(outcome) => outcome.clone().expect("it was waited for"),
            Err(_) => Err(Status::unavailable(
                "the proxy stopped before the checkpoint was answered; ask again with the same key",
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reply(vm: &str) -> CheckpointReply {
        CheckpointReply { vm: vm.to_owned(), snapshots: Vec::new() }
    }

    fn first(claim: Claim) -> (Ticket, Answer) {
        match claim {
            Claim::First(ticket, answer) => (ticket, answer),
            Claim::Repeated(_) => panic!("the key is taken"),
        }
    }

    fn repeated(claim: Claim) -> Answer {
        match claim {
            Claim::Repeated(answer) => answer,
            Claim::First(..) => panic!("the key is free"),
        }
    }

    #[tokio::test]
    async fn whoever_repeats_a_key_gets_the_first_answer() {
        let answers = Answers::default();
        let (ticket, own) = first(answers.claim("k", None).unwrap());
        let joined = repeated(answers.claim("k", None).unwrap());
        ticket.finish(Ok(reply("one")));
        assert_eq!(own.get().await.unwrap().vm, "one");
        assert_eq!(joined.get().await.unwrap().vm, "one");
        let later = repeated(answers.claim("k", None).unwrap());
        assert_eq!(later.get().await.unwrap().vm, "one");
    }

    #[tokio::test]
    async fn a_failure_is_told_and_forgotten() {
        let answers = Answers::default();
        let (ticket, _) = first(answers.claim("k", None).unwrap());
        let joined = repeated(answers.claim("k", None).unwrap());
        ticket.finish(Err(Status::unavailable("down")));
        assert_eq!(joined.get().await.unwrap_err().message(), "down");
        let (ticket, _) = first(answers.claim("k", None).unwrap());
        let joined = repeated(answers.claim("k", None).unwrap());
        drop(ticket);
        assert_eq!(joined.get().await.unwrap_err().code(), tonic::Code::Unavailable);
        first(answers.claim("k", None).unwrap());
    }

    #[test]
    fn memory_and_running_requests_are_bounded() {
        let answers = Answers::default();
        for i in 0..ANSWERS_MAX + 10 {
            first(answers.claim(&i.to_string(), None).unwrap()).0.finish(Ok(reply("x")));
        }
        assert_eq!(answers.lock().entries.len(), ANSWERS_MAX);
        assert!(matches!(answers.claim("9", None).unwrap(), Claim::First(..)), "forgotten");
        repeated(answers.claim("10", None).unwrap());
        let held: Vec<_> =
            (0..CHECKPOINTS_MAX).map(|i| answers.claim(&format!("r{i}"), None).unwrap()).collect();
        let Err(status) = answers.claim("more", None) else { panic!("it must be refused") };
        assert_eq!(status.code(), tonic::Code::ResourceExhausted);
        drop(held);
        first(answers.claim("more", None).unwrap());
    }

    #[test]
    fn a_key_names_one_request_only() {
        let answers = Answers::default();
        let _held = answers.claim("k", None).unwrap();
        let set = SetMembership { group: "g".into(), sequence: 1, expected_vms: 2 };
        let Err(status) = answers.claim("k", Some(&set)) else { panic!("it must be refused") };
        assert_eq!(status.code(), tonic::Code::InvalidArgument);
    }
}
