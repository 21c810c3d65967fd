//! What is expected, what was seen, and where they differ.

use std::fmt::Write as _;

use serde_json::Value;

use super::oracle::{Question, allows};
use super::{Member, PORTS, Protocol};

/// How a pod is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// By its own address.
    Address,
    /// By the address of its service.
    Vip,
    /// By the name of its service.
    Name,
    /// By its service's port on a node.
    NodePort,
    /// By the address that its service has for clients outside.
    External,
}

/// What leads to a member besides its own addresses; of each family, IPv4 first.
#[derive(Debug, Clone, Default)]
pub struct Service {
    /// Cluster addresses.
    pub vips: [String; 2],
    /// Addresses for clients outside.
    pub external: [String; 2],
    /// Ports on the nodes that lead to the first port: of TCP and of UDP.
    pub node_ports: [u16; 2],
}

/// All questions of one kind: each pod to each pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Sheet {
    way: Way,
    v4: bool,
    protocol: Protocol,
    port: u16,
}

/// A question and the answer that the policies give.
#[derive(Debug, Clone, Copy)]
pub struct Cell {
    sheet: Sheet,
    from: usize,
    to: usize,
    /// Whether it may.
    pub allowed: bool,
}

/// A cell that is not as it should be.
#[derive(Debug, Clone, Copy)]
pub struct Wrong<'a> {
    /// Which one.
    pub cell: &'a Cell,
    /// What was seen: a letter of `mesh-hello probe`.
    pub seen: char,
}

impl Wrong<'_> {
    /// Whether something passed that must not.
    pub fn is_leak(&self) -> bool {
        !self.cell.allowed && self.seen == PASSED
    }
}

const PASSED: char = '+';
const SILENT: char = '.';

/// The table for one set of policies. The order of its cells is that of the letters that are seen: pod by pod that asks.
pub struct Table<'a> {
    members: &'a [Member],
    /// Of each member.
    services: &'a [Service],
    /// Addresses of a node, IPv4 first.
    node: &'a [String; 2],
    cells: Vec<Cell>,
}

impl<'a> Table<'a> {
    /// What these policies mean for these pods.
    pub fn new(
        members: &'a [Member],
        services: &'a [Service],
        node: &'a [String; 2],
        policies: &[Value],
    ) -> Self {
        let mut cells = Vec::new();
        for from in 0..members.len() {
            for sheet in sheets() {
                for to in 0..members.len() {
                    let Sheet { v4, protocol, port, .. } = sheet;
                    let question =
                        Question { from: &members[from], to: &members[to], v4, protocol, port };
                    cells.push(Cell { sheet, from, to, allowed: allows(policies, &question) });
                }
            }
        }
        Self { members, services, node, cells }
    }

    /// The targets of one pod as `mesh-hello probe` reads them.
    pub fn targets(&self, from: usize) -> String {
        let mut text = String::new();
        for cell in self.cells.iter().filter(|cell| cell.from == from) {
            let (to, family) = (&self.members[cell.to], usize::from(!cell.sheet.v4));
            let (service, mut port) = (&self.services[cell.to], cell.sheet.port);
            let host = match cell.sheet.way {
                Way::Address => to.addresses[family].to_string(),
                Way::Vip => service.vips[family].clone(),
                Way::Name => format!("{}.{}", to.name, to.namespace),
                Way::External => service.external[family].clone(),
                Way::NodePort => {
                    port = service.node_ports[usize::from(cell.sheet.protocol == Protocol::Udp)];
                    self.node[family].clone()
                }
            };
            let protocol = cell.sheet.protocol.name().to_lowercase();
            let version = if cell.sheet.v4 { 4 } else { 6 };
            let name = to.host();
            let _ = write!(text, " {protocol}{version}/{host}/{port}/{name}");
        }
        text
    }

    /// Number of cells, and of those that are allowed.
    pub fn size(&self) -> (usize, usize) {
        (self.cells.len(), self.cells.iter().filter(|cell| cell.allowed).count())
    }

    /// What differs from `seen`, the letters of all pods one after the other. A letter that is missing differs.
    pub fn wrong(&self, seen: &str) -> Vec<Wrong<'_>> {
        let letters = seen.chars().chain(std::iter::repeat(' '));
        let cells = self.cells.iter().zip(letters);
        let differs = |cell: &Cell, seen| seen != if cell.allowed { PASSED } else { SILENT };
        cells
            .filter(|(cell, seen)| differs(cell, *seen))
            .map(|(cell, seen)| Wrong { cell, seen })
            .collect()
    }

    /// The sheets with wrong cells, for people: rows ask, columns are asked, what is wrong stands in brackets.
    pub fn show(&self, wrong: &[Wrong<'_>]) -> String {
        const SHOWN: usize = 4;
        let bad: Vec<Sheet> =
            sheets().filter(|sheet| wrong.iter().any(|w| w.cell.sheet == *sheet)).collect();
        let mut text = format!("{} of {} cells are wrong\n", wrong.len(), self.cells.len());
        for sheet in bad.iter().take(SHOWN) {
            let family = if sheet.v4 { "IPv4" } else { "IPv6" };
            let Sheet { way, port, protocol, .. } = sheet;
            let _ = writeln!(text, "{} {port} over {family} by {way:?}:", protocol.name());
            self.show_sheet(&mut text, *sheet, wrong);
        }
        if bad.len() > SHOWN {
            let _ = writeln!(text, "and {} more such sheets", bad.len() - SHOWN);
        }
        text
    }

    fn show_sheet(&self, text: &mut String, sheet: Sheet, wrong: &[Wrong<'_>]) {
        let names = self.members.iter().map(|m| format!("{}/{}", m.namespace, m.name));
        let names: Vec<String> = names.collect();
        let _ = writeln!(text, "      {}", names.join(" "));
        for (from, name) in names.iter().enumerate() {
            let _ = write!(text, "  {name}");
            for cell in self.cells.iter().filter(|c| c.sheet == sheet && c.from == from) {
                let found = wrong.iter().find(|w| std::ptr::eq(w.cell, cell));
                let right = if cell.allowed { PASSED } else { SILENT };
                let _ = match found {
                    Some(wrong) => write!(text, " [{}]", wrong.seen),
                    None => write!(text, "  {right} "),
                };
            }
            text.push('\n');
        }
    }
}

/// SCTP only by address: the kernel may have none, and then no socket could name a service. What is for clients outside with one
/// port: inside, it is another address of the same service.
fn sheets() -> impl Iterator<Item = Sheet> {
    let ways = [Way::Address, Way::Vip, Way::Name, Way::NodePort, Way::External];
    let protocols = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];
    let all = ways.into_iter().flat_map(move |way| {
        [true, false].into_iter().flat_map(move |v4| {
            protocols.into_iter().flat_map(move |protocol| {
                PORTS.into_iter().map(move |port| Sheet { way, v4, protocol, port })
            })
        })
    });
    all.filter(|sheet| match sheet.way {
        Way::Address => true,
        Way::Vip | Way::Name => sheet.protocol != Protocol::Sctp,
        Way::NodePort | Way::External => sheet.protocol != Protocol::Sctp && sheet.port == PORTS[0],
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy_table::policies::{draw, sample_members};

    /// Three protocols by address, two by service and by name, on two ports; two on one port by each of the other ways. All over
    /// both families.
    const SHEETS: usize = 2 * (3 * 2 + 2 * 2 + 2 * 2 + 2 + 2);

    fn services() -> Vec<Service> {
        let one = Service {
            vips: ["10.96.0.1".to_owned(), "fd10:96::1".to_owned()],
            external: ["192.0.2.240".to_owned(), "2001:db8::f0".to_owned()],
            node_ports: [30_080, 30_053],
        };
        vec![one; 9]
    }

    #[test]
    fn what_differs_is_found_and_shown() {
        let members = sample_members();
        let (services, node) = (services(), Default::default());
        let table = Table::new(&members, &services, &node, &[]);
        assert_eq!(table.size(), (9 * 9 * SHEETS, 9 * 9 * SHEETS));
        let first = table.targets(0);
        assert!(first.starts_with(" tcp4/10.244.0.10/80/x-a tcp4/10.244.0.11/80/x-b"), "{first}");
        assert!(
            first.contains(" udp6/b.z/81/z-b") && first.contains(" sctp6/fd10:244:0:2::12/80/z-c")
        );
        assert!(
            first.contains(" udp6/2001:db8::f0/80/z-c") && first.contains("/30053/z-c"),
            "{first}"
        );
        let mut seen: Vec<char> = vec!['+'; table.size().0];
        assert!(table.wrong(&seen.iter().collect::<String>()).is_empty());
        seen[1] = '.';
        let seen: String = seen.into_iter().collect();
        let wrong = table.wrong(&seen);
        assert_eq!((wrong.len(), wrong[0].is_leak()), (1, false));
        let shown = table.show(&wrong);
        assert!(
            shown.contains("TCP 80 over IPv4 by Address:") && shown.contains("x/a  +  [.]  + "),
            "{shown}"
        );
        assert_eq!(table.wrong("").len(), table.size().0);
    }

    #[test]
    fn a_leak_is_what_passes_and_must_not() {
        let members = sample_members();
        let (services, node) = (services(), Default::default());
        let closed =
            serde_json::json!({"metadata": {"namespace": "x"}, "spec": {"podSelector": {}}});
        let table = Table::new(&members, &services, &node, &[closed]);
        let all = "+".repeat(table.size().0);
        let wrong = table.wrong(&all);
        // Three pods that eight others do not reach.
        assert_eq!(wrong.len(), 3 * 8 * SHEETS);
        assert!(wrong.iter().all(Wrong::is_leak));
    }

    /// A set that allows nearly all or nothing would test little.
    #[test]
    fn the_sets_that_are_tested_allow_much_and_deny_much() {
        let (members, services, node) = (sample_members(), services(), Default::default());
        for seed in crate::policy_table::SEEDS {
            let (cells, allowed) =
                Table::new(&members, &services, &node, &draw(seed, &members)).size();
            let share = allowed * 100 / cells;
            assert!((20..=80).contains(&share), "seed {seed}: {share} % are allowed");
        }
    }
}
