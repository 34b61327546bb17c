struct Countdown {
    left: u32,
}

impl Iterator for Countdown {
    type Item = u32;

    fn next(&mut self) -> Option<u32> {
        if self.left == 0 {
            return None;
        }
        self.left -= 1;
        Some(self.left + 1)
    }
}

fn main() {
    let text: Vec<String> = Countdown { left: 5 }.map(|n| n.to_string()).collect();
    println!("{} lift off", text.join(" "));

    let even: u32 = Countdown { left: 10 }.filter(|n| n % 2 == 0).sum();
    println!("the even numbers add up to {even}");
}
