using System;
using System.Collections.Generic;
using System.Linq;

public record Meeting(string Title, TimeSpan Start, TimeSpan End)
{
    public bool Overlaps(Meeting other) => Start < other.End && other.Start < End;
}

public class Schedule
{
    private readonly List<Meeting> meetings = new();

    public bool TryAdd(Meeting meeting)
    {
        // Refuse anything that clashes with an earlier booking.
        if (meetings.Any(meeting.Overlaps))
        {
            return false;
        }
        meetings.Add(meeting);
        return true;
    }
}
