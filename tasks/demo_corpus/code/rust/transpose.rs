fn transpose<T: Clone>(rows: &[Vec<T>]) -> Vec<Vec<T>> {
    let width = rows.first().map_or(0, |row| row.len());
    (0..width)
        .map(|column| rows.iter().map(|row| row[column].clone()).collect())
        .collect()
}

fn main() {
    let table = vec![
        vec!["Mon", "Tue", "Wed"],
        vec!["soup", "fish", "rice"],
    ];
    for row in transpose(&table) {
        println!("{}", row.join(": "));
    }
    // Turning twice gives the table back.
    assert_eq!(transpose(&transpose(&table)), table);
}
