use std::cmp::Ordering;

/// Finds the index of `target` in a sorted slice.
fn find<T: Ord>(items: &[T], target: &T) -> Option<usize> {
    let (mut low, mut high) = (0, items.len());
    while low < high {
        let middle = low + (high - low) / 2;
        match items[middle].cmp(target) {
            Ordering::Equal => return Some(middle),
            Ordering::Less => low = middle + 1,
            Ordering::Greater => high = middle,
        }
    }
    None
}

fn main() {
    let trees = ["alder", "beech", "cedar", "hazel", "maple"];
    println!("{:?}", find(&trees, &"hazel"));
    println!("{:?}", find(&trees, &"willow"));
}
