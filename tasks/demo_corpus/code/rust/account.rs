use std::fmt;

#[derive(Debug)]
enum AccountError {
    TooLittle { missing: u64 },
}

impl fmt::Display for AccountError {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            AccountError::TooLittle { missing } => write!(f, "{missing} cents short"),
        }
    }
}

fn withdraw(balance: u64, amount: u64) -> Result<u64, AccountError> {
    balance.checked_sub(amount).ok_or(AccountError::TooLittle {
        missing: amount.saturating_sub(balance),
    })
}

fn main() {
    match withdraw(500, 720) {
        Ok(rest) => println!("{rest} left"),
        Err(error) => println!("{error}"),
    }
}
