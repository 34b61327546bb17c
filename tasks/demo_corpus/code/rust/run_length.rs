/// Packs "aaab" as "3a1b".
fn encode(text: &str) -> String {
    let mut out = String::new();
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        let mut count = 1;
        while chars.next_if_eq(&c).is_some() {
            count += 1;
        }
        out.push_str(&format!("{count}{c}"));
    }
    out
}

fn main() {
    println!("{}", encode("wwwwbbbw"));
}

#[cfg(test)]
mod tests {
    use super::encode;

    #[test]
    fn empty_text_stays_empty() {
        assert_eq!(encode(""), "");
    }
}
