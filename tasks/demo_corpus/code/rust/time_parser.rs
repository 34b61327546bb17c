use std::str::FromStr;

#[derive(Debug, PartialEq)]
struct Time {
    hour: u8,
    minute: u8,
}

impl FromStr for Time {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (h, m) = text.split_once(':').ok_or("missing colon")?;
        let hour: u8 = h.parse().map_err(|_| format!("bad hour {h}"))?;
        let minute: u8 = m.parse().map_err(|_| format!("bad minute {m}"))?;
        if hour > 23 || minute > 59 {
            return Err(format!("{text} is not a time of day"));
        }
        Ok(Time { hour, minute })
    }
}

fn main() {
    println!("{:?}", "18:45".parse::<Time>());
}
