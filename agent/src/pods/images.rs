//! Deleting images that nobody uses when their disk fills up: the least recently used first, with the kubelet's limits.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use mesh_cri::{CallError, Client, v1};

use super::pressure::Stock;

/// Deleting begins when this much of the disk is used.
const HIGH_PERCENT: u64 = 85;
/// It ends when this much is.
const LOW_PERCENT: u64 = 80;
/// An image that is younger may be about to be used.
const YOUNGEST: Duration = Duration::from_secs(120);

/// Images, and when each was used last.
#[derive(Debug, Default)]
pub(crate) struct Images {
    seen: BTreeMap<String, Seen>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Seen {
    first: Instant,
    used: Instant,
    bytes: u64,
}

impl Images {
    /// Looks at what is there, and deletes what has to go. `all` is for a disk that is full: every image that is unused.
    /// Returns how many were deleted.
    pub(crate) async fn collect(
        &mut self,
        client: &Client,
        disk: Stock,
        all: bool,
    ) -> Result<usize, CallError> {
        let images = client.list_images().await?;
        // Containers of others use images, too.
        let containers = client.list_containers(Default::default()).await?;
        let used: BTreeSet<&str> = containers
            .iter()
            .flat_map(|c| [Some(c.image_ref.as_str()), c.image.as_ref().map(|i| i.image.as_str())])
            .flatten()
            .collect();
        let now = Instant::now();
        self.note(&images, &used, now);
        let mut deleted = 0;
        for id in self.plan(disk, all, now) {
            client.remove_image(&id).await?;
            tracing::info!(image = id, "image deleted, nobody uses it and the disk is full");
            self.seen.remove(&id);
            deleted += 1;
        }
        Ok(deleted)
    }

    fn note(&mut self, images: &[v1::Image], used: &BTreeSet<&str>, now: Instant) {
        self.seen.retain(|id, _| images.iter().any(|image| image.id == *id));
        for image in images {
            let fresh = Seen { first: now, used: now, bytes: image.size };
            let entry = self.seen.entry(image.id.clone()).or_insert(fresh);
            let names = image.repo_tags.iter().chain(&image.repo_digests).chain([&image.id]);
            if is_kept(image) || names.into_iter().any(|name| used.contains(name.as_str())) {
                entry.used = now;
            }
        }
    }

    /// The images to delete, in this order.
    fn plan(&self, disk: Stock, all: bool, now: Instant) -> Vec<String> {
        let used = disk.all.saturating_sub(disk.left);
        let mut surplus = match () {
            () if all => u64::MAX,
            () if used > disk.all / 100 * HIGH_PERCENT => used - disk.all / 100 * LOW_PERCENT,
            () => 0,
        };
        let age = |since: Instant| now.saturating_duration_since(since);
        let idle =
            |(_, seen): &(&String, &Seen)| age(seen.first) >= YOUNGEST && !age(seen.used).is_zero();
        let mut idle: Vec<_> = self.seen.iter().filter(idle).collect();
        idle.sort_by_key(|(id, seen)| (seen.used, seen.first, *id));
        let mut chosen = Vec::new();
        for (id, seen) in idle {
            if surplus == 0 {
                break;
            }
            surplus = surplus.saturating_sub(seen.bytes.max(1));
            chosen.push(id.clone());
        }
        chosen
    }
}

/// The image of sandboxes is in use even when there is none: without it no pod could start.
fn is_kept(image: &v1::Image) -> bool {
    let sandbox = |name: &String| name.contains("/pause:") || name.contains("/pause@");
    image.pinned || image.repo_tags.iter().chain(&image.repo_digests).any(sandbox)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(id: &str, tag: &str) -> v1::Image {
        v1::Image {
            id: id.to_owned(),
            repo_tags: vec![tag.to_owned()],
            size: 10,
            ..Default::default()
        }
    }

    const FULL: Stock = Stock { left: 10, all: 100 };
    const ROOM: Stock = Stock { left: 30, all: 100 };

    #[test]
    fn the_least_recently_used_go_until_there_is_room() {
        let (mut images, start) = (Images::default(), Instant::now());
        let all = [image("a", "a:1"), image("b", "b:1"), image("p", "registry.k8s.io/pause:3.9")];
        images.note(&all, &["a:1"].into(), start);
        let later = start + YOUNGEST;
        images.note(&all, &["b"].into(), later);
        let end = later + Duration::from_secs(1);
        images.note(&all, &[].into(), end);
        assert_eq!(images.plan(FULL, false, end), ["a"], "one makes room enough");
        assert_eq!(images.plan(ROOM, false, end), [""; 0]);
        assert_eq!(images.plan(ROOM, true, end), ["a", "b"], "never the sandboxes' own");
    }

    #[test]
    fn what_is_in_use_or_new_stays() {
        let (mut images, start) = (Images::default(), Instant::now());
        images.note(&[image("a", "a:1")], &[].into(), start);
        let soon = start + Duration::from_secs(1);
        assert_eq!(images.plan(FULL, true, soon), [""; 0], "it may be about to be used");
        let later = start + YOUNGEST;
        images.note(&[image("a", "a:1")], &["a"].into(), later);
        assert_eq!(images.plan(FULL, true, later), [""; 0]);
        images.note(&[], &[].into(), later);
        assert!(images.seen.is_empty(), "what somebody else deleted is forgotten");
    }
}
