use std::collections::BTreeMap;

#[derive(Default)]
struct ShoppingList {
    items: BTreeMap<String, (u32, u32)>,
}

impl ShoppingList {
    /// Adds a number of pieces at a price in cents.
    fn add(&mut self, name: &str, count: u32, cents: u32) {
        let entry = self.items.entry(name.to_string()).or_insert((0, cents));
        entry.0 += count;
    }

    fn total(&self) -> u32 {
        self.items.values().map(|(count, cents)| count * cents).sum()
    }
}

fn main() {
    let mut list = ShoppingList::default();
    list.add("soap", 2, 150);
    list.add("yarn", 1, 499);
    println!("{:.2}", list.total() as f64 / 100.0);
}
