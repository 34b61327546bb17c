LINE = /\A(?<time>\d{2}:\d{2}) (?<level>[A-Z]+) (?<message>.+)\z/

def parse(text)
  text.each_line(chomp: true).filter_map do |line|
    match = LINE.match(line)
    next unless match

    match.named_captures.transform_keys(&:to_sym)
  end
end

LOG = <<~TEXT
  08:15 INFO server started
  08:17 WARN disk is nearly full
  this line is broken
  08:21 ERROR disk is full
TEXT

entries = parse(LOG)
entries.reject { |entry| entry[:level] == 'INFO' }.each do |entry|
  puts "#{entry[:time]} #{entry[:message]}"
end
