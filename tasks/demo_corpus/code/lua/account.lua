local Account = {}
Account.__index = Account

function Account.open(owner, balance)
  local self = setmetatable({}, Account)
  self.owner = owner
  self.balance = balance or 0
  return self
end

function Account:withdraw(amount)
  if amount > self.balance then
    error(self.owner .. " cannot withdraw " .. amount, 0)
  end
  self.balance = self.balance - amount
  return self.balance
end

local account = Account.open("Greta", 80)
print(account:withdraw(30))

local ok, message = pcall(account.withdraw, account, 100)
if not ok then
  print("refused: " .. message)
end
